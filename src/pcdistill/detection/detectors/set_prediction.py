"""DETR and its kin from transformers: queries are candidates, and regions are matched with them one to one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

from pcdistill.detection.detectors.base import (
    Adapter,
    Candidates,
    Observed,
    PreparedBatch,
    Regions,
    Stats,
    StudentPass,
    Target,
)
from pcdistill.errors import InputError
from pcdistill.losses import Pyramid

# Their boxes are shares of the image without its padding, of which a mask tells; all others' are of the whole batch.
READ_THE_MASK = ("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer")
KEEP_PROPORTION = (*READ_THE_MASK, "yolos", "lw_detr")  # the others were trained on images stretched to a square
SUMMED = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")  # their loss is the plain sum of the parts they report
CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0  # RT-DETR's, of its matching with true boxes
DIVISOR = 32  # sides of a batch are multiples of this
STRIDES = (4, 8, 16, 32, 64)


class SetState(NamedTuple):
    """Logits [N, Q, K + 1], background first, boxes [N, Q, 4] xyxy in pixels of the batch, and the model's own logits.

    `raw` is the tensor that the model's losses read.
    """

    logits: Tensor
    boxes: Tensor
    raw: Tensor


class HubDetector(nn.Module):
    """A detector of transformers in torchvision's interface: images and targets in, losses or predictions out.

    Args:
        inner: a model of AutoModelForObjectDetection.
        min_size: side of the square that images are stretched to, or the shorter side where they keep their proportion.
        max_size: the longest side where they keep it.
        square: stretch; None: as the kind of model was trained.
        image_mean: per channel of images in 0..1.
        image_std: per channel.
        detections_per_img: boxes of an image at most; None: as many as there are queries.
    """

    def __init__(
        self,
        inner: nn.Module,
        *,
        min_size: int,
        max_size: int | None = None,
        square: bool | None = None,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        detections_per_img: int | None = None,
    ) -> None:
        super().__init__()
        self.inner: Any = inner
        config: Any = inner.config
        self.kind = str(config.model_type)
        self.min_size = min_size
        self.max_size = max_size if max_size is not None else round(min_size * 1333 / 800)
        self.square = self.kind not in KEEP_PROPORTION if square is None else square
        self.stats: Stats = (tuple(image_mean), tuple(image_std))
        self.detections_per_img = detections_per_img

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """Losses by name in training mode; else detections as torchvision gives them."""
        adapter = SetPrediction(self)
        if self.training:
            if targets is None:
                raise InputError("a detector in training mode needs targets: one {boxes, labels} for each image")
            return adapter.student_pass(images, targets).losses
        return adapter.predict(images)


class SetPrediction(Adapter):
    """DETR and its kin. A region is the query that fits it best in class, L1 distance and GIoU, each query once.

    Logits of a softmax have their class for no object last in transformers: it is put first. Those of sigmoids get a 0
    in front, as those of dense detectors. In training some models have queries that are not there in use: those for
    denoising stand before the real ones, and of RF-DETR's and LW-DETR's groups only the first is used. Neither is
    compared.

    Args:
        model: a :class:`HubDetector`, or a model of transformers itself, whose images then have the size of its kind.
    """

    answers_anywhere = False

    def __init__(self, model: nn.Module) -> None:
        own = model if isinstance(model, HubDetector) else HubDetector(model, min_size=side_of(model))
        super().__init__(own)
        self.config = own.inner.config
        self.capacity = _queries(self.config)
        self._takes_mask = own.kind in READ_THE_MASK

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        name = type(model).__name__
        return isinstance(model, HubDetector) or (hasattr(model, "config") and name.endswith("ForObjectDetection"))

    @property
    def outputs(self) -> int:
        return int(self.config.num_labels) + 1

    @property
    def stats(self) -> Stats:
        stats: Stats = self.model.stats
        return stats

    @property
    def image_size(self) -> int:
        return int(self.model.min_size)

    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> PreparedBatch:
        mean, std = (torch.tensor(values, device=images[0].device)[:, None, None] for values in self.stats)
        resized, moved = [], []
        for i, image in enumerate(images):
            height, width = image.shape[-2:]
            size = self._size(height, width)
            own = (image - mean) / std
            if size != (height, width):
                own = F.interpolate(own[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
            resized.append(own)
            if targets is not None:
                factor = targets[i]["boxes"].new_tensor([size[1] / width, size[0] / height] * 2)
                moved.append({**targets[i], "boxes": targets[i]["boxes"] * factor})
        sizes = [(int(own.shape[1]), int(own.shape[2])) for own in resized]
        height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*sizes, strict=True))
        pixels = resized[0].new_zeros(len(resized), 3, height, width)
        for i, own in enumerate(resized):
            pixels[i, :, : own.shape[1], : own.shape[2]] = own
        return PreparedBatch(pixels, sizes, self.stats, moved)

    def student_pass(self, images: Sequence[Tensor], targets: Sequence[Target]) -> StudentPass:
        batch = self.prepare(images, targets)
        wholes = self._wholes(batch)
        labels = [
            {
                "class_labels": target["labels"] - 1,
                "boxes": box_convert(target["boxes"] / whole.repeat(2), "xyxy", "cxcywh"),
            }
            for target, whole in zip(batch.targets, wholes, strict=True)
        ]
        out = self._forward(batch, labels)
        pyramid = pyramid_of(out, self.config, batch)
        return StudentPass(self._losses(out), pyramid, batch, self._state(out, wholes))

    def observe(self, batch: PreparedBatch) -> Observed:
        out = self._forward(batch)
        return Observed(pyramid_of(out, self.config, batch), self._state(out, self._wholes(batch)))

    def candidates(self, state: SetState) -> list[Candidates]:
        return [Candidates(boxes, logits) for boxes, logits in zip(state.boxes, state.logits, strict=True)]

    def places(self, seen: StudentPass, *, own: bool) -> list[Tensor]:
        return [seen.state.raw]

    def shares(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)[..., 1:] if self._softmax else logits[..., 1:].sigmoid()

    def regions(self, state: SetState, *, top_k: int, threshold: float, columns: Tensor | None = None) -> Regions:
        """Its best queries; they show each object once by themselves, so that none is left out as a duplicate."""
        boxes, logits, scores = [], [], []
        for own_boxes, whole in zip(state.boxes, state.logits, strict=True):
            own = whole if columns is None else whole[:, columns]
            rating = self.rate(own)
            best, index = rating.topk(min(top_k, len(rating)))
            index = index[best >= threshold]
            boxes.append(own_boxes[index].detach())
            logits.append(own[index])
            scores.append(rating[index])
        return Regions(boxes, torch.cat(logits), torch.cat(scores))

    def choose(self, state: SetState, boxes: Sequence[Tensor], like: Tensor | None = None) -> list[Tensor]:
        """The query for each region by a Hungarian matching; more regions than there are queries take the nearest."""
        counts = [len(own) for own in boxes]
        classes = [None] * len(boxes) if like is None else like.split(counts)
        triples = zip(self.candidates(state), boxes, classes, strict=True)
        return [self._matched(found, own, one) for found, own, one in triples]

    @torch.no_grad()
    def _matched(self, found: Candidates, boxes: Tensor, like: Tensor | None) -> Tensor:
        if len(boxes) == 0:
            return torch.zeros(0, dtype=torch.int64, device=boxes.device)
        own, wanted = found.boxes.float(), boxes.float()
        side = torch.cat([own, wanted])[:, 2:].amax(dim=0).clamp(min=1).repeat(2)
        cost = L1_COST * torch.cdist(wanted / side, own / side, p=1) - GIOU_COST * generalized_box_iou(wanted, own)
        if like is not None:
            classes = like[:, 1:].argmax(dim=1)
            cost = cost - CLASS_COST * self.shares(found.logits.float())[:, classes].T
        cost = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)
        index = cost.argmin(dim=1)
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        index[torch.as_tensor(rows, device=index.device)] = torch.as_tensor(columns, device=index.device)
        return index

    def predict(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """As transformers' own post-processing without a threshold: of sigmoids the best pairs of query and class."""
        batch = self.prepare(images)
        state = self._state(self._forward(batch), self._wholes(batch))
        found = []
        for i, image in enumerate(images):
            shares, boxes = self.shares(state.logits[i].float()), state.boxes[i].float()
            if self._softmax:
                scores, labels = shares.max(dim=1)
            else:
                most = self.model.detections_per_img or len(shares)
                scores, index = shares.flatten().topk(min(most, shares.numel()))
                labels, boxes = index % shares.shape[1], boxes[index // shares.shape[1]]
            height, width = image.shape[-2:]
            factor = boxes.new_tensor([width / batch.sizes[i][1], height / batch.sizes[i][0]] * 2)
            limits = boxes.new_tensor([width, height] * 2)
            boxes = torch.minimum((boxes * factor).clamp(min=0), limits)
            found.append({"boxes": boxes, "labels": labels + 1, "scores": scores})
        return found

    @property
    def _softmax(self) -> bool:
        """Whether the model has a class for no object."""
        return self.model.kind in ("detr", "yolos", "table-transformer")

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """What an image is scaled to."""
        model = self.model
        if model.square:
            return model.min_size, model.min_size
        scale = min(model.min_size / min(height, width), model.max_size / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _wholes(self, batch: PreparedBatch) -> list[Tensor]:
        """Width and height in pixels of what boxes are shares of, for each image."""
        padded = [batch.image_size] * len(batch.sizes)
        sizes = batch.sizes if self._takes_mask else padded
        return [batch.pixels.new_tensor([width, height], dtype=torch.float32) for height, width in sizes]

    def _forward(self, batch: PreparedBatch, labels: list[dict[str, Tensor]] | None = None) -> Any:
        given: dict[str, Any] = {"pixel_values": batch.pixels}
        if labels is not None:
            given["labels"] = labels
        if self._takes_mask:
            mask = torch.zeros(len(batch.sizes), *batch.image_size, dtype=torch.int64, device=batch.pixels.device)
            for i, (height, width) in enumerate(batch.sizes):
                mask[i, :height, :width] = 1
            given["pixel_mask"] = mask
        return self.model.inner(**given)

    def _state(self, out: Any, wholes: list[Tensor]) -> SetState:
        """The queries that are there in use, too."""
        logits, boxes = out.logits, out.pred_boxes
        denoising = getattr(out, "denoising_meta_values", None)
        if denoising is not None and self.model.inner.training:
            start = denoising["dn_num_split"][0]
            logits, boxes = logits[:, start:], boxes[:, start:]
        if self.capacity is not None:
            logits, boxes = logits[:, : self.capacity], boxes[:, : self.capacity]
        if self._softmax:
            aligned = torch.cat([logits[..., -1:], logits[..., :-1]], dim=-1)
        else:
            aligned = torch.cat([torch.zeros_like(logits[..., :1]), logits], dim=-1)
        pixels = box_convert(boxes, "cxcywh", "xyxy") * torch.stack(wholes).repeat(1, 2)[:, None]
        return SetState(aligned, pixels, out.logits)

    def _losses(self, out: Any) -> dict[str, Tensor]:
        """The library's own loss: by kind, over layers and denoising, where it is the sum of its parts; else whole."""
        if self.model.kind not in SUMMED:
            return {"loss_set": out.loss}
        losses: dict[str, Tensor] = {}
        for name, value in out.loss_dict.items():
            kind = "_".join(name.split("_")[:2])
            losses[kind] = losses[kind] + value if kind in losses else value
        return losses


def side_of(model: Any) -> int:
    """The side in pixels that a kind of model is trained at, where its weights do not say."""
    return 800 if model.config.model_type in KEEP_PROPORTION else 640


def _queries(config: Any) -> int | None:
    """How many queries a model has in use."""
    for name in ("num_queries", "num_detection_tokens"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def pyramid_of(out: Any, config: Any, batch: PreparedBatch) -> Pyramid:
    """The maps that a model of transformers shows, finest first; without levels, if it shows none.

    They are what its encoder gives, as maps or flattened to a sequence, or the backbone's where it has no encoder.
    """
    height, width = batch.image_size
    shown = getattr(out, "encoder_last_hidden_state", None)
    if shown is None:
        shown = getattr(out, "backbone_features", None)
    levels: list[Tensor] = []
    if isinstance(shown, Tensor) and shown.ndim == 3:
        levels = _unflattened(shown, int(getattr(config, "num_feature_levels", None) or 1), height, width)
    elif isinstance(shown, Tensor):
        levels = [shown]
    elif shown is not None:
        levels = [level for level in shown if level is not None and level.ndim == 4]
    return Pyramid(levels, [round(height / level.shape[2]) for level in levels], (height, width))


def _unflattened(sequence: Tensor, count: int, height: int, width: int) -> list[Tensor]:
    """Levels out of a sequence [N, L, D] of `count` maps, each half as fine as the one before; none if none fits."""
    n, length, dim = sequence.shape
    for finest in STRIDES:
        sizes = [(-(-height // (finest * 2**i)), -(-width // (finest * 2**i))) for i in range(count)]
        if sum(h * w for h, w in sizes) == length:
            parts = sequence.split([h * w for h, w in sizes], dim=1)
            return [p.transpose(1, 2).reshape(n, dim, h, w) for p, (h, w) in zip(parts, sizes, strict=True)]
    return []
