"""The scene benchmark: OpenMoji objects on coloured cards, with ground truth and questions.

Read in this order: `vocabulary` (what can be shown), `scene` (what is on one picture),
`render` (pixels), `questions` (language), `build` (files), `show` (contact sheet).
"""
