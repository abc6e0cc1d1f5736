"""Training from a recipe, by transformers' Trainer and TRL's.

    recipe = Recipe(adapters={"mine": {"method": "lora", "r": 8}}, data="texts/", arguments={"max_steps": 200})
    compiled = train(model, tokenizer, recipe, out="run")
    train(model, tokenizer, recipe, out="run", resume=True)  # goes on at the newest checkpoint, bit for bit

`lorac train CONFIG.yaml` reads a recipe: a task, its rows, any method, rule, start and optimizer by name, and the
arguments of TRL's and transformers' trainers by theirs. `examples/train.py` shows how short a loop of one's own is.
"""

from lorac.trainer.recipe import Recipe, read_recipe
from lorac.trainer.run import train

__all__ = ["Recipe", "read_recipe", "train"]
