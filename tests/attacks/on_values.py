"""Values of recipe keys with which no computation is possible."""

from tests.attacks.table import attack, by_override

THEME = "values"


for name, did, word, *parts in [
    ("seed_past_32_bits", "gave a seed of 2^32", "seed=4294967296", "seed: got 4294967296"),
    ("seed_of_many", "gave one seed too large among several", "seeds=[1, -1]", "seeds.1: got -1"),
    ("beta_of_1", "gave a beta of 1", "stages.0.optimizer.betas=[0.9, 1.0]", "betas.1: got 1.0"),
    (
        "beta_below_0",
        "gave a beta below 0",
        "stages.0.optimizer.betas=[-1, 0.9]",
        "betas.0: got -1",
    ),
    ("no_number", "gave .nan", "stages.0.optimizer.lr=.nan", "optimizer.lr: got nan", "finite"),
    ("endless", "gave .inf", "stages.0.optimizer.max_grad_norm=.inf", "got inf", "finite"),
    ("quintillions", "asked for 1e18 steps", f"stages.0.steps={10**18}", "steps: got 1000000000"),
    (
        "weight_of_1e300",
        "weighed 1e300",
        "stages.0.objectives.0.weight=1.0e+300",
        "weight: got 1e+300",
    ),
    (
        "tiny_eps",
        "gave an eps that is 0 in float32",
        "stages.0.optimizer.eps=1.0e-300",
        "eps: got 1e-300",
    ),
    (
        "steps_of_true",
        "asked for true steps",
        "stages.0.steps=true",
        "'steps' is true",
        "give a number",
    ),
    (
        "betas_of_true",
        "gave a beta of true",
        "stages.0.optimizer.betas=[true, 0.9]",
        "'betas' is true",
    ),
    ("weight_of_false", "weighed false", "stages.0.objectives.0.weight=false", "'weight' is false"),
    (
        "long_name",
        "named a run with 300 letters",
        f"name={'n' * 300}",
        "name: got 'nnn",
        "at most 100",
    ),
    ("long_stage", "named a stage with 300 letters", f"stages.0.name={'n' * 300}", "at most 100"),
    (
        "long_variant",
        "named a variant with 300 letters",
        f"variants={{{'v' * 300}: []}}",
        "at most 100",
    ),
    ("variant_above", "named a variant ..", "variants={../up: []}", "variants", "use letters A-Z"),
    (
        "long_path",
        "named a data file no disk has",
        f"data.train={'d' * 300}.json",
        "no such data file",
    ),
    ("nul_in_a_path", "put a NUL into a path", 'data.train="a\\0b"', r"'train' is 'a\x00b'"),
    ("device_meta", "asked for the device meta", "stages.0.engine.device=meta", "no meta device"),
    ("device_mps", "asked for an Apple's GPU", "stages.0.engine.device=mps", "no mps device"),
    ("device_xla", "asked for a TPU", "stages.0.engine.device=xla", "no xla device"),
    (
        "device_past_all",
        "asked for a GPU past all",
        "stages.0.engine.device=cuda:99999999999",
        "device",
    ),
    ("workers", "asked for a million workers", "data.workers=1000000", "data.workers: got 1000000"),
    (
        "patches",
        "asked for a billion tiles",
        "student.image_size={max_patches: 1000000000}",
        "max_patches",
    ),
    (
        "experts",
        "asked for a billion experts",
        "student.convert=[{kind: moe, experts: 1000000000}]",
        "experts",
    ),
    (
        "timeout_s",
        "waited 1e300 seconds",
        "stages.0.engine.timeout_s=1.0e+300",
        "timeout_s: got 1e+300",
    ),
    (
        "epochs",
        "asked for 1e300 epochs",
        "stages.0={name: a, objectives: [{kind: ce}], epochs: 1.0e+300}",
        "epochs",
    ),
    (
        "temperature",
        "divided by nothing",
        "stages.0.objectives=[{kind: kl, temperature: 1.0e-300}]",
        "temperature",
    ),
    (
        "cold_sampling",
        "sampled at 1e-300",
        "stages.0.on_policy={temperature: 1.0e-300}",
        "too small",
    ),
]:
    by_override(THEME, name, did, word, *parts)


@attack(THEME, "wrote a prompt that clears the terminal", "'prompts' is", "remove the character")
def prompt_with_escapes(world):
    world.raw["evaluate"] = {"samples": {"images": ["picture.png"], "prompts": ["a\x1b[2J"]}}


@attack(THEME, "gave the last seed to two stages", "the seed 4294967295 is too large for 2 stages")
def seed_without_room(world):
    world.raw["seeds"] = [1, 2**32 - 1]
    world.raw["stages"].append({**world.raw["stages"][0], "name": "second"})
