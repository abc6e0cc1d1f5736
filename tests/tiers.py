"""The tests that only ``make test-slow`` runs for what they cost, each with what finds its fault before.

A pattern is a test's id below ``tests/``, with ``*`` for anything; ids that stand in ``but`` stay in ``make test``. A
test that is slow by its nature has the marker ``slow`` at its definition.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Moved:
    """Tests that wait for the long run, and what catches their fault before it."""

    pattern: str
    instead: str
    but: tuple[str, ...] = ()
    """Parameters, as in the brackets of an id, of the cases that stay."""

    def takes(self, test: str) -> bool:
        """Return whether a test, of the pattern's file, waits for the long run."""
        matches = fnmatch.fnmatchcase(test.replace("[", "<"), self.pattern.replace("[", "<"))
        return matches and test.partition("[")[2].removesuffix("]") not in self.but


MOVED = (
    Moved("architecture/test_house.py::test_dependencies_point_inward", "`make check` runs the same tool"),
    Moved(
        "backends/onnx/test_exporter.py::test_the_model_is_the_one_that_torch_writes*",
        "two steps, one with casts of operands and one with an op of ours",
        ("promoted", "normed"),
    ),
    Moved(
        "backends/onnx/test_nodes.py::test_an_emitted_program_and_its_graph_are_the_golden_ones*",
        "a Llama's nodes, where adapters are live and where they are merged",
        ("llama_live", "llama_fused"),
    ),
    Moved(
        "backends/onnx/test_exporter.py::test_another_threads_export_answers_as_alone[exported_by_torch]",
        "another thread's decomposition, and test_nothing_of_the_libraries_differs_for_another_thread",
    ),
    Moved("backends/onnx/test_attention.py::test_rotations_by_positions_of_each_row", "rotations of padded rows"),
    Moved(
        "backends/onnxruntime/test_flattening.py::test_every_pair_is_added_where_it_is_computed*",
        "a ViT's pairs",
        ("tiny_vit",),
    ),
    Moved("backends/onnxruntime/test_half.py::test_answers_are_as_near_as_torchs*", "a BERT", ("tiny_bert-dtype0",)),
    Moved(
        "backends/tensorrt/test_plans.py::*",
        "test_calls.py builds and swaps a plan, and test_cpu_check.py compares parsed files of all kinds of hosts",
    ),
    Moved("benchmarks/test_smoke.py::test_it_runs*", "the benchmark of threads on the same path", ("threads",)),
    Moved("benchmarks/test_smoke.py::test_processes_of_their_own", "test_a_process_that_fails_says_why starts one"),
    Moved(
        "campaigns/test_zoo.py::test_it_answers_as_peft_does*",
        "a model of experts and one of PEFT's own cases",
        ("peft/lora-02-linears", "transformers/granitemoe"),
    ),
    Moved("cli/test_cli.py::test_a_closed_pipe_causes_no_traceback", "test_an_interrupt_exits_with_130, in-process"),
    Moved("conformance/test_throw_away.py::*", "test_own_methods.py serves methods of a file of their own"),
    Moved("end_to_end/test_generate_smollm2.py::*", "runtime/generation compares the tokens of tiny models"),
    Moved(
        "end_to_end/test_peft_types.py::test_onnxruntime*",
        "a type of each normal form",
        (
            "oft-plain_mlp-series-live",
            "ia3-plain_mlp-both-live",
            "vera-plain_mlp-plain-live",
            "loha-plain_conv-effective-live",
            "trainable_tokens-plain_mlp-rows-live",
        ),
    ),
    Moved(
        "end_to_end/test_peft_eager.py::test_what_peft_computes[tiny_bert-*",
        "the same configurations on a Llama and on plain models",
        ("tiny_bert-lora", "tiny_bert-embeddings", "tiny_bert-bias_all"),
    ),
    Moved("end_to_end/test_peft_eager.py::test_what_peft_computes[tiny_vit-*", "patches", ("tiny_vit-patches",)),
    Moved("end_to_end/test_peft_mixtures.py::test_in_onnxruntime[fused]", "the live one"),
    Moved("end_to_end/test_quantised.py::test_an_artifact_answers_in_a_new_process*", "artifacts of float weights do"),
    Moved(
        "end_to_end/test_fidelity.py::test_a_model_that_loops_over_its_images_takes_any_number_of_them",
        "batches of two",
    ),
    Moved("end_to_end/test_peft_real.py::*", "test_peft_onnxruntime.py and test_peft_eager.py on a tiny BERT"),
    Moved(
        "end_to_end/test_peft_eager.py::test_what_peft_computes[resnet18-*",
        "plain_conv's convolutions",
        ("resnet18-lora",),
    ),
    Moved(
        "end_to_end/test_peft_eager.py::test_what_peft_computes[tiny_t5-*",
        "the same configurations on other hosts, and T5's own: what it shares and its positions",
        ("tiny_t5-shared", "tiny_t5-relative"),
    ),
    Moved(
        "end_to_end/test_peft_onnxruntime.py::test_what_peft_computes*",
        "a model of each kind of layer: plain, convolutions, attention",
        (
            "plain_mlp-live",
            "plain_mlp-fused",
            "plain_conv-live",
            "plain_conv-baked",
            "tiny_gpt2-live",
            "tiny_bert-fused",
        ),
    ),
    Moved(
        "end_to_end/test_peft_host.py::test_is_left_as_it_was[train-*",
        "hosts in eval mode, and eager ones in training",
        ("train-eager-live", "train-eager-fused"),
    ),
    Moved("end_to_end/test_peft_host.py::test_is_left_as_it_was[eval-onnxruntime-fused]", "the live one"),
    Moved("end_to_end/test_host.py::test_the_host_is_left_as_it_was[onnxruntime-fused--eval]", "the live one"),
    Moved("end_to_end/test_peft_dtypes.py::test_a_file_on_a_bf16_base[tiny_t5-*", "three other hosts"),
    Moved("end_to_end/test_peft_dtypes.py::test_a_bf16_file_on_a_wider_base[*-torch.float64]", "float32 bases"),
    Moved(
        "end_to_end/test_pipeline.py::test_a_pipeline_takes_other_sizes_and_batches",
        "eager parts paint the same bits, and test_host.py has programs of other sizes",
    ),
    Moved("end_to_end/test_peft_mixtures.py::test_in_eager[tiny_t5]", "five other hosts"),
    Moved("frontend/capture/test_host_forms.py::test_branches_inside_branches", "layers in one torch.cond"),
    Moved("passes/test_pipelines.py::test_a_second_run_reports_no_change_and_makes_none[tiny_albert]", "plain models"),
    Moved("end_to_end/test_pipeline.py::test_emitted_parts_paint_the_same_images", "eager parts paint the same bits"),
    Moved("end_to_end/test_silence.py::test_nothing_is_printed*", "a script that is refused", ("refused",)),
    Moved(
        "end_to_end/test_few_shot_series.py::test_deployed_it_answers_as_in_eager_and_holds_no_table_of_tokens*",
        "the answers in eager, and test_conforms of its method on ONNX Runtime",
    ),
    Moved(
        "formats/test_adapterhub.py::test_so_it_does_on_onnx_runtime_at_another_batch_and_length*",
        "a BERT",
        ("bert/seq",),
    ),
    Moved("formats/test_throw_away.py::*", "test_peft_extension.py registers an entry of its own"),
    Moved(
        "frontend/capture/test_repeated_layers.py::test_transformers_models_are_captured_as_before*",
        "test_the_program_is_the_one_that_tracing_every_layer_gives, over hand-written layers",
    ),
    Moved(
        "ir/graph/test_interpreter.py::test_every_level_answers_as_eager*",
        "two plain models and a Llama",
        ("plain_mlp", "plain_conv", "tiny_llama"),
    ),
    Moved(
        "passes/test_cache_attention.py::test_parts_are_answered_as_the_whole*",
        "plain attention, windows with sinks, and compressed keys",
        ("llama", "gpt_oss", "deepseek_v3", "gpt2"),
    ),
    Moved("runtime/generation/test_encoder_decoder_driver.py::test_tokens_are_those_of_peft*", "a T5", ("t5",)),
    Moved(
        "runtime/test_swap.py::test_any_number_of_swaps[*-1000-*",
        "a hundred swaps",
        ("dora-shira-onnxruntime-float32-1000-live",),
    ),
    Moved("session/test_artifact.py::test_equal_input_gives_equal_bytes", "test_killed.py and goldens of dumps"),
    Moved(
        "session/test_artifact.py::test_loading_needs_neither_transformers_nor_the_model",
        "the same of ONNX Runtime, where less is imported",
    ),
    Moved("session/test_artifact.py::*[tiny_gpt2-eager-live]", "a plain model in eager and a Llama on ONNX Runtime"),
    Moved("test_zoo.py::test_model_takes_a_peft_adapter_and_is_left_alone[smollm2]", "ten smaller models"),
    Moved("training/initialisation/test_everywhere.py::test_files_give_the_same_in_a_new_process", "test_exports"),
    Moved(
        "training/test_curves.py::test_the_curve_is_pefts*",
        "LoRA with dropout, DoRA and OFT",
        ("tiny_llama-lora-dropout", "tiny_bert-dora", "tiny_llama-oft"),
    ),
    Moved(
        "training/test_every_method.py::test_it_learns*",
        "a method of each normal form; the kit differentiates every method",
        ("lora", "dora", "ia3", "shira", "hydra", "meteora", "bottleneck", "full", "trainable_tokens", "loha"),
    ),
    Moved("training/test_every_rule.py::test_trainer_is_the_plain_loop*", "one rule", ("lora_plus",)),
    Moved(
        "training/test_learning.py::test_trainer_learns*", "plain loops, and one method", ("llama-lora-checkpointed",)
    ),
    Moved("training/test_preconditioned.py::test_trainer_runs_the_rule", "test_every_rule.py has Trainer run one"),
    Moved(
        "training/transfer/test_transfer.py::test_the_filter_learns_and_the_adapter_goes_over", "its parts, one by one"
    ),
    Moved(
        "variants/test_meteora.py::test_a_llama_with_four_loras_is_the_same_in_onnx_runtime", "the kit's MeteoRA there"
    ),
    Moved("variants/test_any_module.py::*[as captured-*", "the same methods at another batch and length"),
    Moved(
        "variants/test_flexmore.py::test_onnx_runtime_equals_eager_at_another_batch_and_length_and_swaps*",
        "test_any_module.py runs experts there",
    ),
    Moved(
        "variants/test_meteora.py::test_swaps_in_onnx_runtime_take_routers_of_one_structure",
        "test_routed.py exchanges routers and experts there",
    ),
    Moved("variants/test_chain.py::test_conforms[*-transposed-*", "LoRA on a transposed weight"),
    Moved("variants/test_chain.py::test_conforms[*-padded-*", "LoRA on a padded embedding"),
    Moved("variants/test_residual.py::test_conforms[*-transposed-*", "LoRA on a transposed weight"),
    Moved("variants/test_residual.py::test_conforms[*-padded-*", "LoRA on a padded embedding"),
    Moved("runtime/test_threads.py::*[onnxruntime-fused]", "eager fused weights, and live programs"),
    Moved("runtime/test_threads.py::*[eager-live]", "live programs, and eager fused weights"),
    Moved(
        "storage/test_killed.py::test_a_reader_beside_two_writers*",
        "a folder of PEFT's both ways",
        ("peft-renamed", "peft-exchanged"),
    ),
    Moved(
        "variants/test_adaptertune.py::test_onnx_runtime_equals_eager_away*",
        "a vision transformer of torchvision's there, and the kit's swaps",
    ),
    Moved("variants/test_chain.py::test_conforms[*-two_*", "the kit's hosts of one layer"),
    Moved("variants/test_chain.py::test_conforms[*-onnxruntime-*", "chains on ONNX Runtime, end to end"),
    Moved("variants/test_routed.py::test_it_is_the_same_in_onnx_runtime*", "the kit's routed methods there"),
    Moved("training/test_trained.py::test_autocast_trains*", "one dtype", ("lora",)),
    Moved(
        "training/test_every_rule.py::test_a_resumed_run_is_one_that_never_stopped*", "test_checkpoints.py resumes one"
    ),
    Moved("training/test_learning.py::test_checkpointing_changes_no_gradient*", "test_trainer_learns with it"),
    Moved("backends/tensorrt/test_engine.py::test_a_saved_one_loads_in_a_new_process_without_a_gpu", "in this process"),
    Moved("variants/test_routing.py::test_onnx_runtime_breaks_ties_alike*", "two of the best", ("2",)),
    Moved(
        "variants/test_scaling_pass.py::test_sizes_that_a_pass_and_the_branches_share_go_through_a_gate",
        "test_a_program_is_pefts_and_off_costs_what_the_base_does",
    ),
    Moved(
        "variants/test_adaptertune.py::test_every_vision_transformer_has_it_behind_its_blocks*",
        "torchvision's",
        ("torchvision-vit",),
    ),
)


BY_FILE: dict[str, list[Moved]] = defaultdict(list)
for _moved in MOVED:
    BY_FILE[_moved.pattern.partition("::")[0]].append(_moved)


def mark_slow(items: list[pytest.Item], *, whole: bool) -> None:
    """Mark the tests of ``MOVED`` as slow; where the ``whole`` suite was collected, refuse a row that takes no test."""
    taken = set()
    for item in items:
        test = item.nodeid.removeprefix("tests/")
        if rows := [moved for moved in BY_FILE.get(test.partition("::")[0], ()) if moved.takes(test)]:
            taken.update(rows)
            item.add_marker(pytest.mark.slow)
    if whole and (stale := [moved.pattern for moved in MOVED if moved not in taken]):
        raise pytest.UsageError(f"tests/tiers.py names tests that are not there: {', '.join(stale)}")
