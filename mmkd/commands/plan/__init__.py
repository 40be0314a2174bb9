"""`mmkd plan`: what a run would do and cost, without weights and without training."""

from mmkd.commands.plan.make import check_recipe, make_plan, plan_stage, sample_data
from mmkd.commands.plan.show import human, print_plan

__all__ = ["check_recipe", "human", "make_plan", "plan_stage", "print_plan", "sample_data"]
