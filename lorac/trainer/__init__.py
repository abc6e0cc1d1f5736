"""Training from a recipe, by a small loop over accelerate.

    recipe = Recipe(adapters={"mine": {"method": "lora", "r": 8}}, data="texts/", max_steps=200)
    compiled = train(model, tokenizer, recipe, out="run")
    train(model, tokenizer, recipe, out="run", resume=True)  # goes on at the newest checkpoint, bit for bit

A recipe is what `lorac train CONFIG.yaml` reads: the model's causal language modelling loss on texts, any method, rule,
start and optimizer by name. Whatever else a training needs is a loop of one's own: `examples/train.py` shows how short.
"""

from lorac.trainer.loop import train
from lorac.trainer.recipe import Recipe, read_recipe

__all__ = ["Recipe", "read_recipe", "train"]
