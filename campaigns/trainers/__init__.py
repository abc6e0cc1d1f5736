"""Features of Axolotl, LLaMA-Factory and TRL, each run by a recipe of lorac's."""
