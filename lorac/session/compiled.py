"""``Compiled``: a model and its adapters, ready to call, swap, save and train."""

from __future__ import annotations

import concurrent.futures
import inspect
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorac.errors import BaseNeeded, FormatError, InputMismatch, Unavailable
from lorac.formats import save_adapter
from lorac.frontend.components import MAIN_GRAPH, check_component, list_components
from lorac.frontend.host import Host
from lorac.ir.calls.call import Call
from lorac.ir.slots.choice import UNSET, Choice, ChoiceSpec, choice_strengths, parse_choice
from lorac.ir.slots.layouts import drop_marked
from lorac.runtime.batching import check_rows, run_rows
from lorac.runtime.capacity import check_capacity
from lorac.runtime.choice_switch import ChoiceSwitch, HeldChoice, RowGroup, SwapReport
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.generation.prompt_features import check_plain_call
from lorac.runtime.generation.tokenizers import TokenizerFiles, find_inner_tokenizer
from lorac.session.adapter_loading import make_adapter, outline_adapter_forms
from lorac.session.adapter_tensors import AdapterTensors, drop_excluded_keys, ignore_excluded_keys, state_dict_key
from lorac.session.component import Component
from lorac.session.fused_head import install_fused_head
from lorac.session.other_vocabularies import LORAC_STEPS, strength_in_call
from lorac.session.presentation import INTERFACE, describe_compiled, explain, unknown_attribute
from lorac.session.registry import AdapterRegistry, AdapterSize
from lorac.session.session import Session
from lorac.storage.paths import file_stems, parse_path
from lorac.storage.remote import push_folder
from lorac.target.engine import CallResult, Engine
from lorac.target.memory_budget import MemoryBudget
from lorac.variants.adapter import Adapter

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from lorac.report.explain import Explanation
    from lorac.report.graph_views import GraphViews
    from lorac.session.request.compile_request import CompileRequest
    from lorac.session.request.sources import ModelSource


class Compiled:
    """The result of ``lorac.compile``. Every method may be called from any thread.

    Call it like the model. ``adapters=`` in a call chooses adapters for that call only.

    Args:
        session: the model, its adapters and its backend.
        engine: runs the program.

    Attributes:
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        plans: the slots of every touched site.
        pool: the prepared adapters.
        sites: every site of the model.
        switch: activates choices of adapters.
        traits: graph name -> configuration, dtype and device of its model.
        resized: paths of the layers that adapters replace by layers of other sizes.
        input_dtypes: dtype of the original model -> dtype in which it was compiled, for inputs of calls.
        prompt_caches: weak references to the prompt caches that calls of ``generate`` were given.
    """

    def __init__(self, session: Session, engine: Engine) -> None:
        self.session, self.engine, self.mode = session, engine, session.mode
        self.plans, self.pool, self.sites = session.plans, session.pool, session.sites
        self.resized = [path for path, plan in self.plans.items() if plan.site.own_size]
        self.traits, self.input_dtypes = session.traits, session.precision.inputs
        self.switch = ChoiceSwitch(engine, session.plans, session.pool, session.base, session.mode)
        self.prompt_caches = weakref.WeakValueDictionary[int, PromptCache]()
        self._add_lock, self._registry = threading.Lock(), AdapterRegistry(session)
        self._last_call, self._tokenizer = threading.local(), None

    def __call__(self, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        """Call the model. Outputs have the model's own output type, in torch or NumPy like the inputs."""
        return self.call(MAIN_GRAPH, Call(args, kwargs), adapters)

    def call(self, graph: str, call: Call, adapters: Any = UNSET) -> Any:
        """Run a graph once, with the active adapters, a choice for this call, or a choice per row."""
        for name, value in call.kwargs.items():
            if name.endswith("attention_kwargs") and isinstance(value, Mapping) and "scale" in value:
                raise strength_in_call(name)
        interface, kept = self.engine.interfaces.get(graph), list[object]()
        if interface is None:
            check_component(graph, self.traits)
        else:
            call = interface.bind(call.args, call.kwargs)
        if self.input_dtypes:  # timesteps keep their dtype, since half precision would round them
            if interface is not None:
                kept = [call.kwargs[name] for name in interface.row_numbers if name in call.kwargs]
            elif self.engine.module is not None:
                kept = Host.of(list_components(self.engine.module)[graph]).list_row_numbers(call)
            call = call.cast(self.input_dtypes, kept)

        if self.engine.cache_spec(graph) is not None:
            check_plain_call(self.traits[graph])
        if self.resized and "labels" in call.kwargs:
            what = f"labels= cannot be given, since adapters change the number of outputs of '{self.resized[0]}'"
            raise InputMismatch(what, next_step="leave labels= out, and compute the loss of the logits of the answer")

        def run(own: Call, group: RowGroup) -> CallResult:
            return self.switch.with_rows(group, lambda bound, _: bound.run(graph, own))

        by_row = isinstance(adapters, Sequence) and not isinstance(adapters, str)
        if by_row:
            check_rows(call.rows, adapters)
        if by_row and adapters:
            result = self.switch.run_grouped(adapters, graph, lambda groups: run_rows(run, call, groups))
        else:
            result = self.switch.with_choice(None if by_row else adapters, lambda bound, _: bound.run(graph, call))
        self._last_call.aux = result.aux
        return pytree.tree_map(drop_marked, result.output) if self.resized else result.output

    @property
    def aux(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Extra outputs (``aux=``) of this thread's last call: name -> site path -> tensor."""
        outputs: Mapping[str, Mapping[str, torch.Tensor]] = getattr(self._last_call, "aux", {})
        return outputs

    def __getitem__(self, name: str) -> Component:
        """Return one of several models that were compiled together; raises ``ChoiceError`` if it does not exist."""
        return Component(self, check_component(name, self.traits), self.traits[name])

    def generate(
        self,
        inputs: Any = None,
        *,
        adapters: Any = UNSET,
        seed: int | Sequence[int] | None = None,
        draft: ChoiceSpec = UNSET,
        prompt_cache: PromptCache | None = None,
        component: str = MAIN_GRAPH,
        **options: Any,
    ) -> Any:
        """Continue prompts as transformers' ``generate`` does, with the same result type.

        The call keeps the adapters with which it began; in fused mode, swaps wait for its end. Rows may be padded on
        either side. Each row has the same result as in a call of its own.

        Args:
            inputs: token ids (rows, length), unless they are given as ``input_ids``; torch or NumPy.
            adapters: a choice for this call, or a list with one per row.
            seed: seed of a random generator for the call, or a list with one per row. Default: torch's generator.
            draft: a choice of adapters that drafts tokens, which the call's own choice verifies together: None for the
                base, or an adapter cut to a lower rank. The call's own choice decides the result. Default: no draft.
            prompt_cache: a ``lorac.PromptCache`` that keeps prompts between calls, on targets with a cache.
            component: the name of the model to run, where there are several.
            **options: ``input_ids``, ``attention_mask`` and the other arguments of transformers' ``generate``.

        Raises:
            Unavailable: the model does not generate, or the target keeps no cache.
            InputMismatch: an empty prompt, more tokens than there are positions, or options that transformers refuses.
            OptionError: an unknown option.
            ChoiceError: rows and choices differ in number.
            MissingExtra: transformers is not installed.
        """
        from lorac.runtime.generation.generate import generate

        given = options if inputs is None else {"inputs": inputs, **options}
        return generate(self, component, given, adapters=adapters, seed=seed, draft=draft, prompt_cache=prompt_cache)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter."""
        return self.pool.adapters

    @property
    def choice(self) -> Choice:
        """The active choice in canonical form."""
        return self.switch.choice

    @property
    def active(self) -> dict[str, float]:
        """Name -> strength of the active adapters."""
        return choice_strengths(self.choice)

    @property
    def memory(self) -> MemoryBudget:
        """The bytes that adapters and caches take, and their limit: ``memory.limit = 1 << 30``."""
        return self.pool.budget

    def swap(self, adapters: ChoiceSpec, *, settle: bool = False) -> SwapReport:
        """Activate a choice of adapters: a name, ``{name: strength}``, or None.

        Running calls end with the adapters they began with. A swap that fails changes nothing.

        Args:
            settle: in fused mode on ONNX Runtime: also make the merged weights constants of the session, and return
                when calls use the constants. Until then, calls use the weights that the swap bound.

        Raises:
            AdapterNotFound, ChoiceError: the choice names an unknown adapter or is invalid.
            Unavailable: ``settle`` on a target or in a mode that binds no weights; in fused mode, a swap inside a call.
        """
        return self.switch.swap(adapters, settle=settle)

    def hold(self, adapters: ChoiceSpec = UNSET) -> AbstractContextManager[HeldChoice]:
        """Hold a choice of adapters for a block, for a request that takes several calls.

        Every call with ``adapters=held`` computes with the adapters as they were when the block began. In live mode
        they may be swapped, trained and removed meanwhile; a removed adapter's memory is freed when the last block
        that holds it ends. In fused mode, swaps, removals and calls with other choices wait until the block ends; in
        the block's own thread they are refused.

        Args:
            adapters: the choice; default: the active one.

        Raises:
            AdapterNotFound, ChoiceError: as for ``swap``.
            Unavailable: in fused mode, the choice is not the active one.
        """
        return self.switch.hold(adapters)

    def prefetch(self, adapters: ChoiceSpec) -> concurrent.futures.Future[None]:
        """Read and prepare a choice of adapters in a thread, so that the first call with it does not wait.

        It is a hint: where the memory budget has no room, nothing is cached.

        Args:
            adapters: the choice.

        Returns:
            A future that is done when the adapters are ready; its ``result()`` raises the error of reading them.

        Raises:
            AdapterNotFound, ChoiceError: as for ``swap``.
        """
        return self.switch.prefetch(adapters)

    def refuse_baked(self) -> None:
        """Raise ``Unavailable`` if the adapters are constants of the program."""
        self.switch.refuse_baked()

    def add_adapter(self, source: object, name: str | None = None) -> str:
        """Add an adapter at run time, without a rebuild, and return its name. A failure changes nothing.

        Args:
            source: a path, an Adapter, a fresh Variant, or a configuration of PEFT's.
            name: the adapter's name; default: the name of its folder, object or variant.

        Raises:
            NeedsRecompile: the adapter needs more sites, rank or kinds of slots than were reserved.
            CompileError: the adapter needs a merged weight where the base weight is quantised.
            AdapterError: the name is taken.
        """
        self.refuse_baked()
        with self._add_lock:
            adapter = make_adapter(self.session, source, name)
            try:
                prepared = self.pool.prepare(adapter)
            except BaseNeeded:  # base weights exist wherever there are slots, so a missing slot is the better reason
                check_capacity(adapter.name, outline_adapter_forms(self.session, adapter), self.plans, self.sites)
                raise
            check_capacity(adapter.name, prepared, self.plans, self.sites)
            self.session.reads.check(adapter.name, prepared.paths)
            self.switch.refuse_change()
            with self.switch.lock:
                self.pool.check_name_free(adapter.name)
                try:
                    self.switch.add(adapter, prepared)
                    self._on_adapters_changed()
                except BaseException:
                    if adapter.name in self.pool:
                        self.pool.remove(adapter.name)
                    self.switch.states.forget(adapter.name)
                    self._on_adapters_changed()
                    raise
        return adapter.name

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter, also from the active choice; a failure changes nothing.

        Its memory is freed when the last call that uses it ends.
        """
        self.switch.refuse_change()
        with self.switch.lock:
            state, entries = self.switch.state, self.pool.entries
            try:
                self.switch.remove(name)
                for cache in filter(None, (ref() for ref in self.prompt_caches.valuerefs())):
                    cache.forget(self.engine, name)
                self._on_adapters_changed()
            except BaseException:
                self.pool.entries = entries
                self.switch.restore(state)
                self._on_adapters_changed()
                raise

    def _on_adapters_changed(self) -> None:
        """Do nothing; the eager class updates its parameters."""

    def register(self, folder: str | Path) -> list[str]:
        """Register every adapter in a folder, to be read when it is used; return the names.

        An adapter has the name of its file or folder. Thousands may be registered: each takes less than a kilobyte of
        memory until it is used, and ``compiled.memory`` limits the memory of adapters in use. Registered adapters are
        not part of ``compiled.adapters``, and ``save`` omits them with a warning.

        Args:
            folder: a folder of adapters, one file or folder each.

        Raises:
            FormatError, AdapterError, SiteError: the folder has no adapter, or an adapter does not fit the model; then
                no adapter is registered.
            NeedsRecompile: an adapter needs more sites, rank or kinds of slots than were reserved.
        """
        self.refuse_baked()
        with self._add_lock:
            return self._registry.register(folder)

    def register_file(self, path: Path, name: str, digest: str) -> AdapterSize:
        """Register an adapter of one file under a name; return its size. The file is read only if it has the digest.

        Raises:
            FormatError, AdapterError, SiteError, NeedsRecompile: as for ``register``. A use of the adapter raises
                ``FormatError`` if the file was changed.
        """
        self.refuse_baked()
        with self._add_lock:
            return self._registry.register_file(path, name, digest)

    @property
    def graph(self) -> GraphViews:
        """Name -> graph, to print, compare and draw. Target "eager" captures its model now, in eval mode."""
        from lorac.session.graphs import collect_graphs

        return collect_graphs(self.session, self.switch)

    def explain(self, target: str | None = None) -> Explanation:
        """Report how each adapter runs at each site, and why not in a cheaper way.

        Args:
            target: another target; the report also lists the ops that it does not support.
        """
        if target is None:
            return explain(self.session, self.switch)
        from lorac.session.lowering.lower import list_missing_ops

        return explain(self.session, self.switch, target, list_missing_ops(self.session, target))

    def export(self, target: str = "onnxruntime", mode: str = "auto", **options: Any) -> Compiled:
        """Compile the model again, with the adapters' current tensors and the active choice.

        Args:
            mode: as for ``lorac.compile``.
            **options: other arguments of ``lorac.compile``; default: the arguments of this compilation.

        Raises:
            BaseNeeded: the model no longer exists.
            Unavailable: modules or weights of ``compiled.host`` were replaced.
        """
        from lorac.session.request.compile_request import CompileRequest
        from lorac.session.request.sources import read_model

        self.engine.check_module()
        model, moved = self.session.host.original()
        given = {"active": dict(self.choice) or None, **self.session.examples, **moved, **options}
        request = CompileRequest.read(dict(self.adapters), target, mode=mode, **given)
        return build_compiled(read_model(model), request)

    def export_program(self, component: str = MAIN_GRAPH) -> ExportedProgram:
        """Return the model with its adapters as a program for torch's own tools, without code of lorac's.

        The program takes the model's arguments, and the tensors of all slots by name as ``lorac=``; in mode ``"baked"``
        there are no slots. It returns a dict by output name. The slots in its ``example_inputs`` are the active
        choice's; ``program_slots`` returns another choice's. Ranks and the number of rows are dynamic.

        Args:
            component: the name of the model, where there are several.

        Raises:
            ChoiceError: there is no such component.
            BaseNeeded: the model no longer exists.
            CaptureError, ExampleInputsNeeded: the model cannot be captured.
        """
        from lorac.session.lowering.lower import export_program

        if not self.session.host.in_memory:
            return self.export(target="eager", mode=self.mode).export_program(component)
        self.engine.check_module()
        return export_program(self.session, self.choice, component)

    def program_slots(self, program: ExportedProgram, adapters: ChoiceSpec = UNSET) -> dict[str, torch.Tensor]:
        """Return the tensors of a choice by slot, for ``lorac=`` in a call of an exported program.

        Args:
            program: as ``export_program`` returned it.
            adapters: the choice; default: the active one.

        Raises:
            AdapterNotFound, ChoiceError, NeedsRecompile: as for ``swap``.
        """
        from lorac.session.lowering.lower import program_slots

        self.refuse_baked()
        choice = self.choice if adapters is UNSET else parse_choice(adapters, self.pool)
        return program_slots(self.session, program, choice)

    def save(self, folder: str | Path, tokenizer: object = None, *, onnx_adapters: bool = True) -> None:
        """Save the compiled model in a folder, which ``lorac.load(folder)`` loads on any machine.

        An older artifact is replaced atomically. Files that lorac did not write are never removed. Registered adapters
        stay in their own folder: register it again after ``lorac.load``. A warning gives their number.

        Args:
            folder: where to write.
            tokenizer: a tokenizer to save with it, or a processor; default: ``compiled.processor``, if there is one.
            onnx_adapters: also write each adapter for programs that run without lorac, which takes its bytes a second
                time; ``save_choice`` writes such a file later.

        Raises:
            ArtifactError: the folder is not empty and no artifact, or has other files next to an older artifact.
            Unavailable: an active adapter is only registered, or modules or weights of ``compiled.host`` were replaced.
        """
        from lorac.session.saving import save

        self.engine.check_module()
        with self.switch.lock:
            tokenizer = self._tokenizer if tokenizer is None else tokenizer
            save(self.session, self.switch, folder, tokenizer, onnx_adapters=onnx_adapters)

    def push_to_hub(self, repo: str, *, base_model: str | None = None, **options: Any) -> str:
        """Save the compiled model into a repository of the Hugging Face hub, with a card; return the commit's address.

        ``lorac.load(repo)`` loads it. The card names the base, the adapters with their methods, sites and hashes, and
        the hashes of the files; an older card is replaced.

        Args:
            repo: the repository, ``user/name``, which is created if it does not exist.
            base_model: the base's name on the hub.
            **options: as ``Adapter.push_to_hub`` takes them.

        Raises:
            LoracError: as ``save`` and ``Adapter.push_to_hub``.
        """
        snippet = "import lorac\n\ncompiled = lorac.load({name!r})\nprint(compiled)"
        own = {f"`{name}`, {key}": text for name, one in self.adapters.items() for key, text in one.describe().items()}
        facts = {"base": base_model or "not recorded", "target": self.engine.target, "mode": self.mode, **own}
        with tempfile.TemporaryDirectory() as made:
            self.save(Path(made, "files"))
            return push_folder(Path(made, "files"), repo, facts, snippet, {**options, "base_model": base_model})

    def save_choice(self, path: str | Path, adapters: ChoiceSpec, component: str = MAIN_GRAPH) -> None:
        """Write a choice for programs that run without lorac: an ``.onnx_adapter``, or safetensors for other targets.

        ``save`` writes such a file for each adapter. This method writes it for a mixture, or for an adapter that was
        added later.

        Raises:
            AdapterNotFound, ChoiceError, NeedsRecompile: as for ``swap``, or there is no such component.
            Unavailable: the target has no such files, or the choice does not fit into one.
        """
        self.refuse_baked()
        with self.switch.lock:
            self.switch.states.save(parse_choice(adapters, self.pool), component, path)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was set, or the artifact's, or the processor's; None without a tokenizer."""
        return find_inner_tokenizer(self.processor)

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def processor(self) -> Any:
        """The processor of a model that reads images or sounds, if one was set as its tokenizer; else the tokenizer."""
        if isinstance(self._tokenizer, TokenizerFiles):
            self._tokenizer = self._tokenizer.load()
        return self._tokenizer

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise Unavailable(
            "a compiled model is neither copied nor pickled: its engine is bound to this process",
            next_step="make another one by compiled.save(folder) and lorac.load(folder), or one to train by "
            "compiled.export(target='eager')",
        )

    def __repr__(self) -> str:
        return describe_compiled(type(self).__name__, self.session, self.switch)

    def __dir__(self) -> list[str]:
        return list(INTERFACE)

    if not TYPE_CHECKING:  # a type checker would assume that every attribute exists

        def __getattr__(self, name: str) -> NoReturn:
            raise unknown_attribute(self, name)


class CompiledModule(nn.Module, Compiled):
    """A compiled model that is an nn.Module: ``train``, ``parameters``, ``to``, hooks and ``Trainer`` work on it.

    Only adapter tensors require gradients. Attributes that it lacks are looked up on ``host``, the copy of the model.

    Its state dict has every tensor that training may change, once: the adapters' tensors under
    ``adapter_tensors.<name>.`` with each adapter's record, and the model's buffers under ``host.``. A ``/`` in a key
    stands for a dot within a name (``state_dict_key``). The model's parameters are left out. A model with the same
    adapters takes the state dict by ``load_state_dict``, and ``lorac.load_adapter`` reads the files of ``Trainer``.
    """

    _hf_peft_config_loaded = True  # Trainer reads it: whether a quantised model has adapters to train

    def __init__(self, session: Session, engine: Engine) -> None:
        assert engine.module is not None
        nn.Module.__init__(self)
        self.host = engine.module
        self.adapter_tensors = nn.ModuleDict()
        self.training = engine.module.training
        nn.Module.register_state_dict_post_hook(self, drop_excluded_keys)
        nn.Module.register_load_state_dict_post_hook(self, ignore_excluded_keys)
        Compiled.__init__(self, session, engine)
        self._on_adapters_changed()

    def forward(self, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        """Run the model's forward, with the active adapters or a choice for this call."""
        # Under torch.compile, trace the call as one graph, or break the graph and say why.
        if not torch.compiler.is_dynamo_compiling():
            return Compiled.__call__(self, *args, adapters=adapters, **kwargs)
        from lorac.session import whole_call

        if adapters is not UNSET or self.engine.trace_key is None:
            torch._dynamo.graph_break(msg=whole_call.BREAKS)
            return Compiled.__call__(self, *args, adapters=adapters, **kwargs)
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        training = "".join("1" if module.training else "0" for module in self.modules())
        state = self.engine.trace_key + training
        return whole_call.call_in_one_graph(self._trace_name, state, tensors, (args, kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "forward" and install_fused_head(self, value)):
            nn.Module.__setattr__(self, name, value)

    def train(self, mode: bool = True) -> CompiledModule:
        """Switch to training or eval mode; a switch to eval mode updates the slots from the trained tensors."""
        nn.Module.train(self, mode)
        for module in self.adapter_tensors.values() if mode else ():
            if isinstance(module, AdapterTensors) and module.adapter.name in dict(self.choice):
                module.warn_of_untrained(self.session.options.aux)
        if not mode and self.mode == "live":
            self.switch.refresh(self.switch.state)
        return self

    def _on_adapters_changed(self) -> None:
        """Register exactly the tensors of the pool's adapters as parameters and buffers, by name."""
        known = {held.adapter: held for held in self.adapter_tensors.values() if isinstance(held, AdapterTensors)}
        own = {name: known.get(adapter) or AdapterTensors(adapter) for name, adapter in sorted(self.adapters.items())}
        tensors = {state_dict_key(name): module for name, module in own.items()}
        self.adapter_tensors = nn.ModuleDict(tensors).train(self.training)
        self.pool.given = {name: module.find_given for name, module in own.items()}
        from lorac.session.whole_call import name_for_traces  # torch's compiler, which compiling has imported by now

        self._trace_name = name_for_traces(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapters in PEFT's form: one into the folder, or several into its subfolders; other files stay.

        Raises:
            FormatError: PEFT has no such method; ``lorac.save_adapter`` writes any method in lorac's own format.
        """
        adapters, root = self.adapters, parse_path(folder, "the folder of save_pretrained", FormatError, "unreadable")
        for name, stem in file_stems(sorted(adapters)).items():
            path = root if len(adapters) == 1 else root / stem
            save_adapter(adapters[name], path, model=self.session.view)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompiledModule:
        """Move the parameters, for ``to``, ``half`` and ``cuda``, and bind the moved tensors.

        Raises:
            Unavailable: the dtype would change; or, in fused mode, the device, since swaps write weights in place.
        """
        for tensor in self.parameters() if self.mode != "baked" else ():
            moved = fn(tensor.detach()[:0] if tensor.dim() else tensor.detach().clone())
            if moved.dtype != tensor.dtype or (self.mode == "fused" and moved.device != tensor.device):
                raise Unavailable(
                    "a compiled model keeps its dtype, and in fused mode its device",
                    next_step="compile the model again with dtype= or device=",
                )
        nn.Module._apply(self, fn, recurse)
        nn.ModuleList(self.engine.hidden)._apply(fn)
        self.switch.rebind()
        return self

    __repr__ = Compiled.__repr__  # instead of nn.Module's

    def __dir__(self) -> list[str]:
        inherited = (n for n, member in vars(nn.Module).items() if n[0] != "_" and callable(member))
        return sorted({*INTERFACE, "save_pretrained", *inherited})

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "host" or "_modules" not in self.__dict__ or "host" not in self._modules:
                raise
        if name in LORAC_STEPS:  # transformers' mixins would write adapters into the host
            raise unknown_attribute(self, name)
        try:
            return getattr(self._modules["host"], name)
        except AttributeError as error:
            raise unknown_attribute(self, name) from error


def build_compiled(source: ModelSource, request: CompileRequest) -> Compiled:
    """Compile a model as a request asks for: open a session, build its engine, and activate the first choice."""
    from lorac.session.building import build_engine, open_session, resolve_active

    session = open_session(source, request)
    choice = resolve_active(session, source, request)
    return make_compiled(session, build_engine(session, choice), choice)


def make_compiled(session: Session, engine: Engine, choice: Choice) -> Compiled:
    """Return the compiled model over an engine, and activate a choice."""
    compiled = Compiled(session, engine) if engine.module is None else _eager_class(engine.module)(session, engine)
    if session.mode == "baked":
        compiled.switch.record_baked(choice)
    elif choice:
        compiled.swap(dict(choice))
    return compiled


def _eager_class(module: nn.Module) -> type[CompiledModule]:
    """Make a subclass of ``CompiledModule`` whose ``forward`` has the signature of the model's.

    Trainers inspect the signature of a class's ``forward``, and sometimes the class's name: to choose the columns
    of a data set, to find the labels, and to decide whether the model or the trainer averages the loss.
    """

    def forward(self: CompiledModule, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        return CompiledModule.forward(self, *args, adapters=adapters, **kwargs)

    forward.__doc__ = CompiledModule.forward.__doc__
    forward.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]  # functions take attributes
    members: dict[str, Any] = {"forward": forward, "__module__": __name__, "__doc__": CompiledModule.__doc__}
    return type(f"Compiled{type(module).__name__}", (CompiledModule,), members)
