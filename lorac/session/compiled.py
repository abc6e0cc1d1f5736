"""``Compiled``: a model and its adapters, ready to call, swap, save and train."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch import nn

from lorac.errors import BaseNeeded, FormatError, Unavailable
from lorac.formats import save_adapter
from lorac.frontend.components import MAIN_GRAPH, check_component
from lorac.ir.slots.choice import UNSET, Choice, ChoiceSpec
from lorac.runtime.capacity import check_capacity
from lorac.runtime.switchable_model import SwitchableModel
from lorac.session.adapter_loading import make_adapter, outline_adapter_forms
from lorac.session.adapter_tensors import AdapterTensors, drop_excluded_keys, ignore_excluded_keys, state_dict_key
from lorac.session.component import Component
from lorac.session.fused_head import install_fused_head
from lorac.session.other_vocabularies import LORAC_STEPS, refuse_strength_in_call
from lorac.session.presentation import INTERFACE, describe_compiled, explain, unknown_attribute
from lorac.session.registry import AdapterRegistry, AdapterSize
from lorac.session.session import Session
from lorac.storage.paths import file_stems, parse_path
from lorac.target.engine import Engine

if TYPE_CHECKING:
    from lorac.report.explain import Explanation
    from lorac.report.graph_views import GraphViews
    from lorac.runtime.generation.prompt_cache import PromptCache
    from lorac.session.request.compile_request import CompileRequest
    from lorac.session.request.sources import ModelSource


class Compiled(SwitchableModel):
    """The result of ``lorac.compile``.

    Calling it answers as the model does. ``adapters=`` in a call chooses adapters for that call only.

    Args:
        session: the model, its adapters and its backend.
        engine: runs the program.
    """

    def __init__(self, session: Session, engine: Engine) -> None:
        SwitchableModel.__init__(
            self,
            engine=engine,
            plans=session.plans,
            pool=session.pool,
            base=session.base,
            mode=session.mode,
            traits=session.traits,
            input_dtypes=session.precision.inputs,
        )
        self.session, self.sites = session, session.sites
        self._add_lock, self._registry = threading.Lock(), AdapterRegistry(session)

    def __call__(self, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        """Answer as the model does: with its own output type, in torch or NumPy like the inputs."""
        refuse_strength_in_call(kwargs)
        return self.call(self.bind(MAIN_GRAPH, args, kwargs), adapters)

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

        It is one call: it keeps the adapters with which it began, and in fused mode a swap waits for its end. Rows may
        be padded on either side. Each row gives what it gives alone.

        Args:
            inputs: token ids (rows, length), unless they are given as ``input_ids``; torch or NumPy.
            adapters: a choice for this call, or a list with one per row.
            seed: of a generator for the call, or a list with one per row. Default: torch's own generator.
            draft: a choice of adapters that proposes tokens ahead, which are then verified together: None for the
                base, or an adapter cut to a lower rank. The result is that of the call's own choice. Default: none.
            prompt_cache: a ``lorac.PromptCache`` that keeps prompts between calls, on targets with a cache.
            component: which of several models.
            **options: ``input_ids``, ``attention_mask`` and whatever else transformers' ``generate`` takes.

        Raises:
            Unavailable: the model does not generate, or the target keeps no cache.
            InputMismatch: an empty prompt, more tokens than there are positions, or what transformers refuses.
            OptionError: an unknown option.
            ChoiceError: rows and choices differ in number.
            MissingExtra: transformers is not installed.
        """
        from lorac.runtime.generation.generate import generate

        given = options if inputs is None else {"inputs": inputs, **options}
        return generate(self, component, given, adapters=adapters, seed=seed, draft=draft, prompt_cache=prompt_cache)

    def add_adapter(self, source: object, name: str | None = None) -> str:
        """Add an adapter at run time, without a rebuild, and return its name. A failure leaves no trace.

        Args:
            source: a path, an Adapter, a fresh Variant, or a configuration of PEFT's.
            name: its name; default: the folder's, the adapter's own, or the variant's.

        Raises:
            NeedsRecompile: it needs more sites, rank or kinds of slots than were reserved.
            CompileError: it needs a merged weight at a quantised weight.
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
            self.add_prepared(adapter, prepared)
        return adapter.name

    def register(self, folder: str | Path) -> list[str]:
        """Register every adapter in a folder, to be read when it is used; return the names.

        The name of a file or folder is the adapter's, wherever an adapter's name is asked for. Thousands may be
        registered: each takes less than a kilobyte of memory until it is used, and ``compiled.memory`` bounds what
        those in use take. They are not part of ``compiled.adapters``, nor of what ``save`` writes, which says so.

        Args:
            folder: holds adapters, one file or folder each.

        Raises:
            FormatError, AdapterError, SiteError: there is none, or one does not fit the model; then none is registered.
            NeedsRecompile: one needs more sites, rank or kinds of slots than were reserved.
        """
        self.refuse_baked()
        with self._add_lock:
            return self._registry.register(folder)

    def register_file(self, path: Path, name: str, digest: str) -> AdapterSize:
        """Register an adapter of one file under a name, for as long as its bytes have a digest; return its size.

        Raises:
            FormatError, AdapterError, SiteError, NeedsRecompile: as for ``register``; also, when it is used, if the
                file was changed.
        """
        self.refuse_baked()
        with self._add_lock:
            return self._registry.register_file(path, name, digest)

    def _on_adapters_changed(self) -> None:
        """Do nothing; the eager class updates its parameters."""

    @property
    def graph(self) -> GraphViews:
        """Name -> graph, to print, compare and draw. Target "eager" captures its model now, in eval mode."""
        from lorac.session.graphs import collect_graphs

        return collect_graphs(self.session, self)

    def explain(self, target: str | None = None) -> Explanation:
        """Report what was done with each adapter at each site, and why not something cheaper.

        Args:
            target: also list the ops that this target would not compute.
        """
        if target is None:
            return explain(self.session, self)
        from lorac.session.lowering.lower import list_missing_ops

        return explain(self.session, self, target, list_missing_ops(self.session, target))

    def export(self, target: str = "onnxruntime", mode: str = "auto", **options: Any) -> Compiled:
        """Compile the model again, with the adapters' present tensors and the active choice.

        Args:
            mode: as for ``lorac.compile``.
            **options: other arguments of ``lorac.compile``; default: those of this compilation.

        Raises:
            BaseNeeded: the model is gone.
        """
        from lorac.session.request.compile_request import CompileRequest
        from lorac.session.request.sources import read_model

        model, moved = self.session.host.original()
        given = {"active": dict(self.choice) or None, **self.session.examples, **moved, **options}
        request = CompileRequest.read(dict(self.adapters), target, mode=mode, **given)
        return build_compiled(read_model(model), request)

    def save(self, folder: str | Path, tokenizer: object = None, *, onnx_adapters: bool = True) -> None:
        """Write a folder from which ``lorac.load(folder)`` makes the compiled model again, anywhere.

        It replaces an older artifact in one step. Files that lorac did not write are never removed. Registered adapters
        stay in their own folder, which is to be registered again after ``lorac.load``; a warning says how many.

        Args:
            folder: where to write.
            tokenizer: a tokenizer to save with it; default: ``compiled.tokenizer``, if there is one.
            onnx_adapters: whether each adapter is also written as programs read it that run without lorac. It takes its
                bytes a second time; ``save_choice`` writes such a file later.

        Raises:
            ArtifactError: the folder holds something else, or other files next to an older artifact.
            Unavailable: an active adapter is registered only.
        """
        from lorac.session.saving import save

        with self._swap_lock:
            tokenizer = self._tokenizer if tokenizer is None else tokenizer
            save(self.session, self, folder, tokenizer, onnx_adapters=onnx_adapters)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise Unavailable(
            "a compiled model is neither copied nor pickled: its engine is bound to this process",
            next_step="compiled.save(folder) and lorac.load(folder) make another one, in any process; to train a copy, "
            "compiled.export(target='eager')",
        )

    def __repr__(self) -> str:
        return describe_compiled(self, len(self.sites))

    def __dir__(self) -> list[str]:
        return list(INTERFACE)

    if not TYPE_CHECKING:  # a type checker would take every attribute to exist

        def __getattr__(self, name: str) -> NoReturn:
            raise unknown_attribute(self, name)


class CompiledModule(nn.Module, Compiled):
    """A compiled model that is an nn.Module: ``train``, ``parameters``, ``to``, hooks and ``Trainer`` work on it.

    Of its parameters only adapter tensors need gradients. Attributes it lacks are looked up on the copy of the model.

    Its state dict holds what training may change, each tensor once: the adapters' tensors under
    ``adapter_tensors.<name>.`` with each adapter's record, and the model's buffers under ``host.``. A ``/`` in a key
    stands for a dot within a name (``state_dict_key``). The model's parameters are left out. A model with the same
    adapters takes the state dict by ``load_state_dict``, and ``lorac.load_adapter`` reads what ``Trainer`` saves of it.
    """

    _hf_peft_config_loaded = True  # Trainer asks it whether a quantised model has adapters to train

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
        """Run the model's forward, with the active adapters or those chosen for this call."""
        return Compiled.__call__(self, *args, adapters=adapters, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "forward" and install_fused_head(self.host, value, self.plans)):
            nn.Module.__setattr__(self, name, value)

    def train(self, mode: bool = True) -> CompiledModule:
        """Switch to training or eval mode; in eval mode the slots hold the tensors as they were trained."""
        nn.Module.train(self, mode)
        for module in self.adapter_tensors.values() if mode else ():
            if isinstance(module, AdapterTensors) and module.adapter.name in dict(self.choice):
                module.warn_of_untrained(self.session.options.aux)
        if not mode and self.mode == "live":
            self._refresh(self._state)
        return self

    def _on_adapters_changed(self) -> None:
        """Register the tensors of the pool's adapters as parameters and buffers, by name, and no others."""
        known = {held.adapter: held for held in self.adapter_tensors.values() if isinstance(held, AdapterTensors)}
        own = {name: known.get(adapter) or AdapterTensors(adapter) for name, adapter in sorted(self.adapters.items())}
        tensors = {state_dict_key(name): module for name, module in own.items()}
        self.adapter_tensors = nn.ModuleDict(tensors).train(self.training)
        self.pool.given = {name: module.find_given for name, module in own.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapters as PEFT does: one into the folder, or each into a folder of its own; other files stay.

        Raises:
            FormatError: PEFT has no such method; ``lorac.save_adapter`` writes any method in lorac's own format.
        """
        adapters, root = self.adapters, parse_path(folder, "where save_pretrained writes to", FormatError, "unreadable")
        for name, stem in file_stems(sorted(adapters)).items():
            path = root if len(adapters) == 1 else root / stem
            save_adapter(adapters[name], path, model=self.session.view)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompiledModule:
        """Move the parameters, behind ``to``, ``half`` and ``cuda``, and bind the moved tensors.

        Raises:
            Unavailable: to another dtype; or to another device in fused mode, whose swaps write weights in place.
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
        self.rebind()
        return self

    def __repr__(self) -> str:
        return describe_compiled(self, len(self.sites))

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
    """Return the compiled model over an engine, with a choice active."""
    compiled = Compiled(session, engine) if engine.module is None else _eager_class(engine.module)(session, engine)
    if session.mode == "baked":
        compiled.record_baked(choice)
    elif choice:
        compiled.swap(dict(choice))
    return compiled


def _eager_class(module: nn.Module) -> type[CompiledModule]:
    """Make a class for a model, whose ``forward`` has the signature of the model's own.

    Trainers look at the signature of a class's ``forward``, and sometimes at the class's name: to choose the columns
    of a data set, to find the labels, and to decide who averages the loss.
    """

    def forward(self: CompiledModule, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        return Compiled.__call__(self, *args, adapters=adapters, **kwargs)

    forward.__doc__ = CompiledModule.forward.__doc__
    forward.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]  # functions take attributes
    members: dict[str, Any] = {"forward": forward, "__module__": __name__, "__doc__": CompiledModule.__doc__}
    return type(f"Compiled{type(module).__name__}", (CompiledModule,), members)
