"""Taps: named features of any image classifier by forward hooks, without a change to the model."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pcdistill.distillation.teacher import logits_of
from pcdistill.errors import InputError, PcdistillError
from pcdistill.losses._features import Features
from pcdistill.models.feature_maps import Layout, check_names, ends_in_channels, prefix_tokens, tensor_of, unwrap

MOST_STAGES = 4
ACTIVATION_MODULES = ("torch.nn.modules.activation", "timm.layers.activations")
SHORTCUTS = ("shortcut", "downsample", "skip")  # names of the branch whose batch normalisation is not the last one


class Taps:
    """Runs a model and returns its :class:`Features`: stage outputs, what comes before their activation, and the rest.

    The first `run` looks at one pass in eval mode over two of its images, which changes nothing in the model, to learn
    which modules make the stages; from then on a run is one pass of the model with a handful of hooks. Outside of `run`
    the hooks do nothing. A model in torch.compile must not have run before its first `run` here: a compiled graph
    keeps the hooks that were there when it was made.

    Args:
        model: images [N, C, H, W] -> logits [N, K]. It may be wrapped (DistributedDataParallel, torch.compile): the
            wrapper is called, the hooks sit inside.
        names: the modules whose outputs are the stages, shallow to deep, as `model.named_modules()` names them. None
            chooses: the names in the model's own `FEATURES`; else children layer1, layer2, ...; else timm's
            `feature_info`; else the last module at each resolution. Of more than four, the deepest four; of a
            transformer with one resolution, four blocks evenly spaced.

    Raises:
        InputError: a name that the model does not have, with the nearest one.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        self.model = model
        self._inner = unwrap(model)
        if names is not None:
            check_names(self._inner, names)
        self._wanted = None if names is None else tuple(names)
        self._plan: _Plan | None = None
        self._handles: list[RemovableHandle] = []
        self.seen: dict[str, Tensor] = {}  # what the hooks saw; empty but within a run
        self._running = False
        self._removed = False

    @property
    def names(self) -> tuple[str, ...] | None:
        """The modules that are tapped; None before the first run of a model whose stages are chosen automatically."""
        return self._wanted if self._plan is None else tuple(stage.name for stage in self._plan.stages)

    def run(self, images: Tensor, index: Tensor | None = None) -> Features:
        """Call the model once on images [N, C, H, W].

        Args:
            images: what the model takes.
            index: [N] positions in the data set; handed on to the losses that need them.

        Raises:
            InputError: a stage whose output cannot be read as maps [N, D, H, W], or no stage at all.
        """
        if self._removed:
            raise PcdistillError("these taps were removed from the model; make new ones")
        if self._plan is None:
            self._plan = _observe(self._inner, images, self._wanted)
            self._install(self._plan)
        self.seen.clear()
        self._running = True
        try:
            logits = logits_of(self.model(images))
        finally:
            self._running = False
        seen = dict(self.seen)
        self.seen.clear()
        return self._collect(self._plan, seen, images, logits, index)

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._removed = True

    def __enter__(self) -> "Taps":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _install(self, plan: "_Plan") -> None:
        modules = dict(self._inner.named_modules())

        def keep_output(key: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if self._running:
                    self.seen[key] = tensor_of(output)

            return hook

        def keep_input(key: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                if self._running:
                    # an activation that works in place is about to write over it
                    self.seen[key] = args[0].clone() if getattr(module, "inplace", False) else args[0]

            return hook

        for stage in plan.stages:
            self._handles.append(modules[stage.name].register_forward_hook(keep_output(f"map {stage.name}")))
            if stage.activation is not None:
                hook = keep_input(f"before {stage.name}")
                self._handles.append(modules[stage.activation].register_forward_pre_hook(hook))
        if plan.classifier is not None:
            self._handles.append(modules[plan.classifier].register_forward_pre_hook(keep_input("pooled")))

    def _collect(
        self, plan: "_Plan", seen: dict[str, Tensor], images: Tensor, logits: Tensor, index: Tensor | None
    ) -> Features:
        maps, before = [], []
        for stage in plan.stages:
            if f"map {stage.name}" not in seen:
                raise PcdistillError(
                    f'module "{stage.name}" was not called in this pass: the model took another branch, or it was '
                    "compiled and run before its features were asked for; make the taps first"
                )
            maps.append(plan.layout.as_map(seen[f"map {stage.name}"], stage.name, images))
            raw = seen.get(f"before {stage.name}")
            before.append(maps[-1] if raw is None else plan.layout.as_map(raw, stage.name, images))
        pooled = seen.get("pooled")
        if pooled is not None and pooled.ndim != 2:
            pooled = pooled.flatten(1) if pooled.shape[1:].numel() == max(pooled.shape[1:]) else None
        if pooled is None:
            pooled = maps[-1].mean((2, 3))
        modules = dict(self._inner.named_modules())
        classifier = None if plan.classifier is None else modules[plan.classifier]
        norms = [None if stage.norm is None else modules[stage.norm] for stage in plan.stages]
        return Features(maps, before, pooled, logits, classifier, index, norms)


@dataclass(frozen=True)
class _Stage:
    name: str
    activation: str | None
    norm: str | None


@dataclass(frozen=True)
class _Plan:
    stages: tuple[_Stage, ...]
    classifier: str | None
    layout: Layout


@dataclass(frozen=True)
class _Call:
    """One call of a module in the observed pass."""

    name: str
    module: nn.Module
    input: Any
    output: Tensor


def classifier_of(model: nn.Module, images: Tensor) -> nn.Linear | None:
    """The linear layer that makes the model's logits, as one pass over two images shows it; None if there is none."""
    inner = unwrap(model)
    calls, logits = _watch(inner, images)
    name = _find_classifier(inner, calls, logits)
    found = None if name is None else inner.get_submodule(name)
    return found if isinstance(found, nn.Linear) else None


def _observe(model: nn.Module, images: Tensor, wanted: tuple[str, ...] | None) -> _Plan:
    """What one pass shows of the stages to tap."""
    calls, logits = _watch(model, images)
    layout = Layout(prefix_tokens(model), getattr(model, "output_fmt", None) == "NHWC")
    names = wanted or _choose(model, calls, images)
    return _Plan(
        tuple(_stage(name, calls, images, layout) for name in names), _find_classifier(model, calls, logits), layout
    )


def _watch(model: nn.Module, images: Tensor) -> tuple[list[_Call], Tensor]:
    """The calls of one pass in eval mode, and its logits; batch statistics and random numbers are left as they are."""
    calls: list[_Call] = []
    handles = []
    for name, module in model.named_modules():

        def record(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            x = tensor_of(output)
            if isinstance(x, Tensor):
                calls.append(_Call(name, module, args[0] if args else None, x))

        handles.append(module.register_forward_hook(record))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            logits = logits_of(model(images[:2]))
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return calls, logits


def _stage(name: str, calls: Sequence[_Call], images: Tensor, layout: Layout) -> _Stage:
    """The activation that makes a stage's output, and the batch normalisation before it."""
    own = [call for call in calls if call.name == name]
    if not own:
        raise InputError(f'features: module "{name}" is not called when the model runs')
    output = own[-1].output
    inside = [call for call in calls if call.name == name or call.name.startswith(f"{name}.")]
    activation = None
    for call in inside:
        if type(call.module).__module__.startswith(ACTIVATION_MODULES) and call.output is output:
            activation = call
    before = output if activation is None else activation.input
    norms = [
        call
        for call in calls
        if isinstance(call.module, nn.modules.batchnorm._BatchNorm) and call.output.shape == output.shape
    ]
    direct = [call for call in norms if call.output is before]
    residual = [
        call for call in norms if call in inside and not any(word in call.name.removeprefix(name) for word in SHORTCUTS)
    ]
    norm = [None, *(direct or residual)][-1]
    layout.as_map(output, name, images)  # raise now if it is no map
    return _Stage(name, None if activation is None else activation.name, None if norm is None else norm.name)


def _choose(model: nn.Module, calls: Sequence[_Call], images: Tensor) -> list[str]:
    declared = getattr(model, "FEATURES", None)
    if declared:
        check_names(model, declared)
        return list(declared)
    numbered = {int(m[1]): name for name, _ in model.named_children() if (m := re.fullmatch(r"layer(\d+)", name))}
    if len(numbered) >= 2:
        return [numbered[i] for i in sorted(numbered)]
    called = {call.name for call in calls}
    info: Any = getattr(model, "feature_info", None)  # timm
    entries = list(info.get_dicts() if hasattr(info, "get_dicts") else info or [])
    named = [str(entry["module"]) for entry in entries]
    if named and called.issuperset(named):
        one_resolution = len({entry.get("reduction") for entry in entries}) == 1
        return _spread(named) if one_resolution else named[-MOST_STAGES:]
    found = _last_at_each_resolution(model, calls, images)
    if len(found) < 2:
        found = _blocks(model, calls) or found
    if not found:
        raise InputError(
            f"the model {type(model).__name__} shows no feature maps; name its stages: features: [module, ...]"
        )
    return found


def _last_at_each_resolution(model: nn.Module, calls: Sequence[_Call], images: Tensor) -> list[str]:
    """Of the module whose children show the most resolutions (the trunk), the last child at each; the deepest four."""
    position = {call.name: i for i, call in enumerate(calls)}
    best: list[str] = []
    for trunk_name, trunk in model.named_modules():
        last: dict[tuple[int, int], tuple[int, str]] = {}
        for child, _ in trunk.named_children():
            name = f"{trunk_name}.{child}" if trunk_name else child
            x = calls[position[name]].output if name in position else None
            if x is not None and x.ndim == 4:
                height, width = x.shape[1:3] if ends_in_channels(x, images) else x.shape[2:]
                if height * width > 1:
                    last[height, width] = max((position[name], name), last.get((height, width), (-1, "")))
        best = max(best, [name for _, name in sorted(last.values())], key=len)
    return best[-MOST_STAGES:]


def _blocks(model: nn.Module, calls: Sequence[_Call]) -> list[str]:
    """Of a network with one resolution: the blocks of one type in its longest list of them."""
    outputs = {call.name: call.output for call in calls}
    best: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        groups: dict[type, list[str]] = defaultdict(list)
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if full in outputs and outputs[full].ndim in (3, 4) and any(child.children()):
                groups[type(child)].append(full)
        best = max([best, *groups.values()], key=len)
    return _spread(best) if len(best) > 1 else []


def _spread(names: Sequence[str]) -> list[str]:
    """At most four names, evenly spaced, the last among them."""
    count = min(MOST_STAGES, len(names))
    return [names[round((i + 1) * len(names) / count) - 1] for i in range(count)]


def _find_classifier(model: nn.Module, calls: Sequence[_Call], logits: Tensor) -> str | None:
    """timm's classifier if there is one; else the last linear layer called that gives the logits' width."""
    linear = [
        call.name
        for call in calls
        if isinstance(call.module, nn.Linear) and call.output.shape[-1] == logits.shape[-1] and call.name
    ]
    get_classifier: Any = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        head = get_classifier()
        head = head[0] if isinstance(head, tuple | list) else head
        linear = [call.name for call in calls if call.module is head and call.name in linear] or linear
    return linear[-1] if linear else None
