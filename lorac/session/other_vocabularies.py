"""The methods by which PEFT, transformers and diffusers manage adapters, each with its counterpart in lorac.

A compiled model refuses them on every target. On target ``"eager"`` they would otherwise reach the copy of the model,
and change it without an update of the engine.
"""

from collections.abc import Mapping

from lorac.errors import ChoiceError

_NAMES_BY_STEP: Mapping[str, str] = {
    "compiled.add_adapter(path, name=...) adds an adapter": (
        "inject_adapter load_adapter load_attn_procs load_lora_adapter load_lora_weights"
    ),
    "compiled.swap('name') activates one adapter, compiled.swap({'a': 0.7, 'b': 0.3}) a mixture": (
        "add_weighted_adapter enable_adapter_layers enable_adapters enable_lora set_adapter set_adapters"
    ),
    "compiled.swap(None) deactivates every adapter, and adapters=None in a call does so for that call": (
        "disable_adapter disable_adapter_layers disable_adapters disable_lora unload unload_lora unload_lora_weights"
    ),
    "compiled.active maps the name of each active adapter to its strength": (
        "active_adapter active_adapters active_peft_config get_active_adapters has_active_enabled_adapter"
    ),
    "compiled.adapters maps names to adapters, and compiled.explain() reports what is done with them": (
        "get_layer_status get_list_adapters get_model_status peft_config supports_lora_conversion"
    ),
    "compiled.remove_adapter('name') removes an adapter": "delete_adapter delete_adapters",
    "lorac.compile(..., mode='fused') merges the active adapters, and compiled.swap(None) takes them out again": (
        "fuse_lora fused_loras merge_adapter num_fused_loras unfuse_lora unmerge_adapter"
    ),
    "to run merged weights, lorac.compile(..., mode='baked'); for a merged checkpoint, lorac.merge_into(model, "
    "compiled.adapters, 'name').save_pretrained(folder)": "merge_and_unload",
    "compiled.adapters['name'].numel() counts the values of an adapter, all of which lorac trains unless its method "
    "freezes them": "get_nb_trainable_parameters print_trainable_parameters",
    "compiled.adapters['name'].parameters() are its tensors": "set_requires_grad",
    "lorac.compile leaves the model as it was: keep it": "get_base_model",
    "change the model, then compile it": (
        "dequantize fuse_qkv_projections init_weights initialize_weights prepare_model_for_gradient_checkpointing "
        "resize_position_embeddings resize_token_embeddings set_decoder set_encoder set_input_embeddings "
        "set_output_embeddings tie_weights unfuse_qkv_projections"
    ),
    "lorac.save_adapter(compiled.adapters['name'], folder, model=model) writes an adapter": (
        "create_or_update_model_card get_adapter_state_dict lora_state_dict save_attn_procs save_lora_adapter "
        "save_lora_weights"
    ),
    "lorac.load(folder) loads what compiled.save(folder) writes": "from_pretrained",
    "lorac.compile(..., reserve=lorac.Reserve(rank=64)) makes room for adapters that are added later": (
        "enable_lora_hotswap enable_peft_hotswap"
    ),
    "lorac.compile(..., device=...) says where the model runs": "set_lora_device",
}
LORAC_STEPS: Mapping[str, str] = {name: step for step, names in _NAMES_BY_STEP.items() for name in names.split()}
"""Method or attribute of another library -> its counterpart in lorac."""
_COMPUTING_NAMES_BY_STEP: Mapping[str, str] = {
    "call it on the original, then compile that": (
        "disable_freeu disable_gradient_checkpointing enable_freeu enable_gradient_checkpointing "
        "load_textual_inversion set_attn_processor set_default_attn_processor unload_textual_inversion"
    ),
    "lorac.diffusion.compile(..., parts=[...]) leaves a model to PyTorch: call it on the original there": (
        "disable_attention_slicing disable_cache disable_forward_chunking disable_npu_flash_attention disable_slicing "
        "disable_tiling disable_vae_slicing disable_vae_tiling disable_xformers_memory_efficient_attention "
        "disable_xla_flash_attention enable_attention_slicing enable_cache enable_forward_chunking "
        "enable_layerwise_casting enable_npu_flash_attention enable_parallelism enable_slicing enable_tiling "
        "enable_vae_slicing enable_vae_tiling enable_xformers_memory_efficient_attention enable_xla_flash_attention "
        "load_ip_adapter set_attention_backend set_attention_slice set_ip_adapter_scale "
        "set_use_memory_efficient_attention_xformers set_use_npu_flash_attention set_use_xla_flash_attention "
        "unload_ip_adapter"
    ),
    "lorac.compile(..., device=...) says where the model runs": (
        "enable_group_offload enable_model_cpu_offload enable_sequential_cpu_offload"
    ),
}
COMPUTING_STEPS: Mapping[str, str] = {
    name: step for step, names in _COMPUTING_NAMES_BY_STEP.items() for name in names.split()
}
"""diffusers' method that sets how or where a model computes -> its counterpart in lorac.

An eager model that is compiled alone forwards these methods to its copy of the model."""


def strength_in_call(argument: str) -> ChoiceError:
    """Return the error for a LoRA's strength in an argument of diffusers, such as ``cross_attention_kwargs``."""
    return ChoiceError(
        f"{argument}={{'scale': ...}} sets the strength of diffusers' LoRAs, not of lorac's adapters",
        next_step="compiled.swap({'name': 0.7}) sets it",
    )
