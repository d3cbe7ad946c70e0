"""The teacher: frozen, always in eval mode, with its own normalisation, resolution and order of classes."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.distillation.reduced import COMPUTED, reduce_weights
from pcdistill.distillation.sharding import Rounds
from pcdistill.errors import InputError, nearest

Stats = tuple[Sequence[float], Sequence[float]]


def align_classes(teacher_classes: Sequence[str], student_classes: Sequence[str]) -> list[int]:
    """Positions in the teacher's output of the student's classes, matched by name.

    Args:
        teacher_classes: names of the teacher's outputs, in order.
        student_classes: names of the data's classes, in order; all must be among the teacher's.

    Raises:
        InputError: naming the classes that the teacher does not have.
    """
    position = {name: i for i, name in enumerate(teacher_classes)}
    if len(position) != len(teacher_classes):
        raise InputError("the teacher's class names must be unique to be matched by name")
    missing = [name for name in student_classes if name not in position]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise InputError(
            f"the teacher does not know {len(missing)} of the data's {len(student_classes)} classes: {shown}"
            f"{nearest(missing[0], teacher_classes)}; train the teacher on these classes first "
            "(--teacher-epochs N, and for a weights file --allow mismatched-weights) or rename the class folders"
        )
    return [position[name] for name in student_classes]


class Teacher(nn.Module):
    """A frozen model that turns the student's images into logits over the student's classes.

    `train()` has no effect on it: BatchNorm and Dropout stay as in evaluation through every step. A model in half or
    double precision gets its images in it, and its logits come back in float32.

    Args:
        model: any module that maps images [N, C, H, W] to logits [N, K].
        class_map: positions of the student's classes in the K outputs, or None to take the outputs as they are.
        student_stats: mean and std with which the incoming images were normalised.
        teacher_stats: mean and std that the teacher expects; None means the student's.
        image_size: the teacher's resolution in pixels, or None for the student's.
        precision: of the weights: "float32" leaves the model as it is; "bfloat16", "float16" and "float8" change it in
            place. A reduced teacher computes without autocast.
        batch_size: the most images in one pass; None: all that come.

    Raises:
        InputError: `class_map` or statistics that cannot be, before anything is computed, or that do not fit the
            teacher's outputs and the images, when it is.

    Attributes:
        rounds: keeps the processes in step that a sharded teacher is split over; None: it is whole.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        class_map: Sequence[int] | None = None,
        student_stats: Stats | None = None,
        teacher_stats: Stats | None = None,
        image_size: int | None = None,
        precision: str = "float32",
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.model = model.eval().requires_grad_(False)
        reduce_weights(self.model, precision)
        self.image_size, self.precision, self.batch_size = image_size, precision, batch_size
        self.rounds: Rounds | None = None
        if image_size is not None and image_size < 1:
            raise InputError(f"the teacher's image_size must be 1 pixel or more, got {image_size}")
        places = None if class_map is None else _places(class_map)
        self.register_buffer("class_map", places, persistent=False)
        self._last = -1 if places is None else int(places.max())
        scale = shift = None
        if student_stats is not None and teacher_stats is not None:
            s_mean, s_std, t_mean, t_std = _stats(student_stats, teacher_stats)
            if not (torch.equal(s_mean, t_mean) and torch.equal(s_std, t_std)):
                # (x * s_std + s_mean - t_mean) / t_std as one multiply-add
                scale, shift = s_std / t_std, (s_mean - t_mean) / t_std
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    scale: Tensor | None
    shift: Tensor | None
    class_map: Tensor | None

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """The student's images [N, C, H, W] as the teacher expects them."""
        if self.scale is not None and self.shift is not None:
            if 1 not in (len(self.scale), images.shape[1]) and len(self.scale) != images.shape[1]:
                raise InputError(
                    f"mean and std of student and teacher are of {len(self.scale)} channels, the images have "
                    f"{images.shape[1]}"
                )
            images = images * self.scale + self.shift
        if self.image_size is not None and images.shape[-1] != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", antialias=True, align_corners=False)
        return images if images.dtype == self.dtype else images.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: by its first floating-point parameter; float32 if it has none."""
        if self.precision in COMPUTED:
            return COMPUTED[self.precision]
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def select(self, logits: Tensor) -> Tensor:
        """The columns of the student's classes, in the student's order."""
        if self.class_map is not None:
            if logits.shape[1] <= self._last:
                raise InputError(
                    f"class_map names position {self._last} of the teacher's outputs, which are {logits.shape[1]}, "
                    "counted from 0"
                )
            logits = logits[:, self.class_map]
        return logits if self.dtype == torch.float32 else logits.float()

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        """The images [N, C, H, W] in parts for one pass each."""
        return (images,) if self.batch_size is None else images.split(self.batch_size)

    def autocast(self, images: Tensor) -> AbstractContextManager[Any]:
        """Without autocast where the weights' precision was chosen: it would mix another into theirs."""
        return torch.autocast(images.device.type, enabled=False) if self.precision in COMPUTED else nullcontext()

    # Not inference_mode: no faster (benchmarks/teacher_modes.py), and losses cannot save its tensors for backward.
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C] over the student's classes, without a graph."""
        with self.autocast(images):
            found = [self.select(logits_of(self.model(self.prepare(part)))) for part in self.parts(images)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def finish(self) -> None:
        """To be called by every process that a sharded teacher is split over, after what they may do unequally often.

        It computes on for the others until all of them are here.
        """
        if self.rounds is not None:
            self.rounds.finish()


def _places(class_map: Sequence[int]) -> Tensor:
    """Positions in the teacher's output, checked."""
    places = torch.as_tensor(class_map)
    if places.ndim != 1 or places.is_floating_point() or places.dtype == torch.bool or not len(places):
        raise InputError(f"class_map must be whole numbers, one for each class of the student, got {class_map}")
    places = places.long()
    if bool((places < 0).any()) or len(places.unique()) < len(places):
        raise InputError(
            f"class_map must hold positions of the teacher's outputs, from 0 and each once, got {class_map}"
        )
    return places


def _stats(*stats: Stats) -> list[Tensor]:
    """Mean and std [C, 1, 1] of each, checked."""
    found = [torch.as_tensor(part, dtype=torch.float32) for one in stats for part in one]
    most = max(part.numel() for part in found)  # one number stands for every channel: grey images may meet RGB
    fits = all(part.ndim == 1 and len(part) in (1, most) and bool(part.isfinite().all()) for part in found)
    if not fits or any(bool((std <= 0).any()) for std in found[1::2]):
        raise InputError(
            "student_stats and teacher_stats must be (mean, std) with a number for each channel and std above 0, got "
            + " and ".join(map(str, stats))
        )
    return [part[:, None, None] for part in found]


class TeacherEnsemble(nn.Module):
    """Several teachers that teach as one: the weighted mean of their probabilities, or of their logits.

    Args:
        members: over the same classes, in the same order.
        weights: one > 0 for each; only their shares of the sum count.
        combine: "probabilities": logits are the logarithm of the mean of the probabilities at temperature 1, so that
            their softmax is that mean; "logits": the mean of the logits.
    """

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float], combine: str = "probabilities") -> None:
        super().__init__()
        if combine not in ("probabilities", "logits"):
            raise ValueError(f'combine must be "probabilities" or "logits", got {combine!r}')
        self.members = nn.ModuleList(members)
        self.shares = [weight / sum(weights) for weight in weights]
        self.combine = combine

    def train(self, mode: bool = True) -> "TeacherEnsemble":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C] over the student's classes, without a graph."""
        return self.together([member(images) for member in self.members])

    def together(self, logits: Sequence[Tensor]) -> Tensor:
        """One teacher's logits [N, C] from those of each, in float32 or better."""
        stacked = torch.stack([z if z.dtype == torch.float64 else z.float() for z in logits])
        shares = torch.tensor(self.shares, dtype=stacked.dtype, device=stacked.device)[:, None, None]
        if self.combine == "logits":
            return (shares * stacked).sum(0)
        return (stacked.log_softmax(2) + shares.log()).logsumexp(0)


def members_of(teacher: "Teacher | TeacherEnsemble") -> list[Teacher]:
    """The teachers that teach as one: itself, if it is one."""
    return [*cast(Iterable[Teacher], teacher.members)] if isinstance(teacher, TeacherEnsemble) else [teacher]


def logits_of(output: Any) -> Tensor:
    """Logits out of what a model returned: a tensor, `.logits` or ["logits"], or the first of a tuple.

    Raises:
        InputError: anything else.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    keys = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    got = type(output).__name__ + keys
    raise InputError(f'the model must return logits [N, C], or hold them as "logits", got {got}')
