"""The benchmarks that need no judge and no server: short names, and the columns of their data.

The columns are those that lmms-eval 0.7.3's functions of each task read.
"""

# Where lmms-eval's task of this name does not exist, or holds parts that only a judge or a server
# can score, the part that can be scored here.
ALIASES = {
    "mmbench": "mmbench_en_dev_static",
    "textvqa": "textvqa_val",
    "vqav2": "vqav2_val",
    "vizwiz": "vizwiz_vqa_val",
    "vizwiz_vqa": "vizwiz_vqa_val",
    "seed": "seedbench",
    "mmmu": "mmmu_val",
}

_SCIENCEQA = ("image", "question", "hint", "choices", "answer")
_VQA = ("image", "question", "question_id", "answers")
COLUMNS = {
    "mme": ("image", "question", "question_id", "category", "answer"),
    "mmbench_en_dev_static": (
        *("image", "index", "question", "hint", "answer", "A", "B", "C", "D"),
        *("category", "L2-category", "source", "split"),
    ),
    "pope": ("image", "question", "question_id", "answer"),
    "gqa": ("imageId", "question", "answer"),
    "scienceqa": _SCIENCEQA,
    "scienceqa_img": _SCIENCEQA,
    "textvqa_val": _VQA,
    "vqav2_val": _VQA,
    "vizwiz_vqa_val": _VQA,
    "seedbench": (
        *("image", "question", "question_id", "data_type", "answer"),
        *("choice_a", "choice_b", "choice_c", "choice_d"),
    ),
    "ai2d": ("image", "question", "options", "answer"),
    "chartqa": ("image", "question", "answer", "type"),
    "mmmu_val": ("id", "question", "options", "question_type", "answer", "image_1"),
}

# {task: configuration of the same data set with columns id and image}: its own rows name the
# images by imageId.
PICTURES = {"gqa": "testdev_balanced_images"}

# Tasks that score two questions of an image together.
PAIRED = ("mme",)
