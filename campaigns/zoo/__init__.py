"""Every model people have, tiny: what PEFT adapts of it, lorac compiles, and answers as PEFT does.

``python -m campaigns.zoo run`` goes through the models and appends to a journal, from which a run is resumed;
``python -m campaigns.zoo page`` makes docs/models.md of it, ``python -m campaigns.zoo causes`` lists what stands in the
way, most frequent first, and ``python -m campaigns.zoo then`` what families generate that were once refused. The models
are random and need no download; timm is needed beside the development extras.
"""
