"""Files, processes, signals, progress and plugins: what needs neither models nor recipes."""
