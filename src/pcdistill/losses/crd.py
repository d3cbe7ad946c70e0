"""Contrastive representation distillation (CRD): tell the same image in the other network from images of other classes.

Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", arXiv 1910.10699 (2020).
"""

import math

import torch
from torch import Tensor, nn

from pcdistill.losses._common import Reduction, check_temperature, reduce_loss, shape, upcast
from pcdistill.losses._features import Features, check_vector_pair, full_precision, nothing, unit
from pcdistill.losses.base import FeatureLoss, Needs

__all__ = ["CRDLoss", "crd_loss"]

NO_INDEX = (
    "CRD needs the position of every image in the data set, to find its entry in the memory: features.index must be "
    "given; a loader of your own does not tell it"
)


def crd_loss(log_scores: Tensor, *, n_data: int, eps: float = 1e-7, reduction: Reduction = "mean") -> Tensor:
    """Noise-contrastive loss of one positive and K negatives drawn from n_data samples.

        c = K / n_data    loss = -log(s_0 / (s_0 + c + eps)) - sum_{k=1}^{K} log(c / (s_k + c + eps))

    Args:
        log_scores: log s, [N, 1 + K], the positive first: cosine / temperature minus the log of the normalisation Z.
            Any floating dtype; the arithmetic is float32 or better.
        n_data: samples that the negatives are drawn from, > 0.
        eps: >= 0, added to the denominators.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none", > 0. Falls with the positive's score, rises with the negatives'. N = 0 gives 0.

    Raises:
        ValueError: a shape, number or reduction that does not fit.
        TypeError: scores that are not floating point.

    Source:
        arXiv 1910.10699, eq. 9 to 11 with the approximation of section 3.2's critic; eps is the authors' code's.
    """
    if log_scores.ndim != 2 or log_scores.shape[1] < 2:
        raise ValueError(f"log_scores must be [N, 1 + K] with K >= 1, got {shape(log_scores)}")
    if not log_scores.is_floating_point():
        raise TypeError(f"log_scores must be floating point, got {log_scores.dtype}")
    if n_data < 1:
        raise ValueError(f"n_data must be > 0, got {n_data}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    x = upcast(log_scores)
    noise = (x.shape[1] - 1) / n_data
    denominator = torch.logaddexp(x, torch.full_like(x[:1, :1], math.log(noise + eps)))
    positive = denominator[:, 0] - x[:, 0]
    return reduce_loss(positive + (denominator[:, 1:] - math.log(noise)).sum(1), reduction)


class CRDLoss(FeatureLoss):
    """:func:`crd_loss` in both directions, with embeddings and a memory of every training image for both networks.

        v = W h / |W h|    log s_k = <v, m_k> / temperature - log Z    m_i <- unit(momentum m_i + (1 - momentum) v_i)

    The student's embeddings are compared with the teacher's memory and the other way round. Z is the first batch's mean
    score times n_data and stays. Negatives are independent uniform draws from the images of other classes, or from all
    other images where the labels are not known. The draws are a function of two buffers, `seed` and `step`: a training
    that is resumed from its state goes on with the same ones. In eval mode nothing is remembered.

    Args:
        student: features of an example batch with `index`; of the rest only shapes are used.
        teacher: features of the same batch.
        n_data: number of training images.
        labels: [n_data] their classes; None draws negatives from all other images.
        negatives: K, drawn for each image.
        width: of the embeddings.
        temperature: of the scores.
        momentum: of the memory, in [0, 1).
        eps: as in the function.
    """

    needs = Needs(index=True)

    memory_student: Tensor
    memory_teacher: Tensor
    log_z: Tensor
    seed: Tensor
    step: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    def __init__(
        self,
        student: Features,
        teacher: Features,
        *,
        n_data: int | None,
        labels: Tensor | None = None,
        negatives: int = 16384,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        if student.index is None:
            raise ValueError(NO_INDEX)
        if n_data is None or n_data < 2:
            raise ValueError(f"n_data, the number of training images, must be 2 or more, got {n_data}")
        for name, number in (("negatives", negatives), ("width", width)):
            if number < 1:
                raise ValueError(f"{name} must be > 0, got {number}")
        check_temperature(temperature)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps must be a finite number >= 0, got {eps}")
        check_vector_pair(student.pooled, teacher.pooled)
        device = student.pooled.device
        self.negatives, self.temperature, self.momentum, self.eps = negatives, temperature, momentum, eps
        self.embed_student = nn.Linear(student.pooled.shape[1], width, device=device)
        self.embed_teacher = nn.Linear(teacher.pooled.shape[1], width, device=device)
        bound = math.sqrt(3 / width)  # rows of length about 1
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, torch.empty(n_data, width, device=device).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), math.inf, device=device))
        self.register_buffer("seed", torch.randint(2**62, (), device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        for name, value in zip(("order", "first", "count"), _groups(labels, n_data), strict=True):
            self.register_buffer(name, value.to(device), persistent=False)

    @property
    def n_data(self) -> int:
        return int(self.memory_student.shape[0])

    def draw(self, index: Tensor) -> Tensor:
        """The positive and K negatives for every sample [N] of this step: [N, 1 + K] positions in the data set."""
        n = index.shape[0]
        row = torch.arange(n, device=index.device) + _rank() * n
        column = torch.arange(self.negatives, device=index.device)
        number = splitmix64(self.seed, (self.step << 40) + (row[:, None] << 20) + column)
        first, count = self.first[index][:, None], self.count[index][:, None]
        place = number % (self.n_data - count)
        place = place + torch.where(place >= first, count, 0)  # past the sample's own class
        return torch.cat([index[:, None], self.order[place]], dim=1)

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        n = student.logits.shape[0]
        if n == 0:
            return nothing(student)
        if student.index is None:
            raise ValueError(NO_INDEX)
        if list(student.index.shape) != [n]:
            raise ValueError(f"features.index must be [{n}], one position for each image, got {shape(student.index)}")
        check_vector_pair(student.pooled, teacher.pooled)
        index = student.index.to(student.pooled.device)
        chosen = self.draw(index)
        with full_precision(student.pooled):
            v_s = unit(self.embed_student(upcast(student.pooled)), dim=1)
            v_t = unit(self.embed_teacher(upcast(teacher.pooled.detach())), dim=1)
            losses, log_z = [], []
            for i, (v, memory) in enumerate(((v_s, self.memory_teacher), (v_t, self.memory_student))):
                # A copy: the graph needs the rows as they are now, and they are about to be written over.
                scores = (v @ memory.to(v.dtype).clone().T).gather(1, chosen) / self.temperature
                means = _of_all_processes(torch.logsumexp(scores.detach().flatten(), 0, keepdim=True))
                mean = torch.logsumexp(means, 0) - math.log(scores.numel() * len(means))
                log_z.append(torch.where(self.log_z[i].isfinite(), self.log_z[i], mean + math.log(self.n_data)))
                losses.append(crd_loss(scores - log_z[i], n_data=self.n_data, eps=self.eps))
        if self.training:
            self._remember(index, v_s.detach(), v_t.detach(), torch.stack(log_z))
        return losses[0] + losses[1]

    @torch.no_grad()
    def _remember(self, index: Tensor, v_s: Tensor, v_t: Tensor, log_z: Tensor) -> None:
        self.log_z.copy_(log_z)
        self.step += 1
        index = _of_all_processes(index)
        for memory, v in ((self.memory_student, v_s), (self.memory_teacher, v_t)):
            mixed = self.momentum * memory[index] + (1 - self.momentum) * _of_all_processes(v).to(memory.dtype)
            memory.index_copy_(0, index, unit(mixed, dim=1))

    def extra_repr(self) -> str:
        return f"n_data={self.n_data}, negatives={self.negatives}, temperature={self.temperature:g}"


def _groups(labels: Tensor | None, n_data: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples in order of class [n], and where each sample's class begins in that order and how many it has, [n] each.

    Without labels every sample is a class of its own.
    """
    if labels is None:
        own = torch.arange(n_data)
        return own, own, torch.ones(n_data, dtype=torch.int64)
    if list(labels.shape) != [n_data] or labels.is_floating_point():
        raise ValueError(f"labels must be [{n_data}] class indices, one for each image, got {shape(labels)}")
    order = labels.cpu().argsort(stable=True)
    counts = torch.bincount(labels.cpu())
    if int(counts.max()) == n_data:
        raise ValueError("CRD draws negatives from other classes, and all training images are of one class")
    firsts = counts.cumsum(0) - counts
    return order, firsts[labels.cpu()], counts[labels.cpu()]


def splitmix64(seed: Tensor, counter: Tensor) -> Tensor:
    """Numbers in [0, 2^63) that depend on seed and counter alone, the same on every device: the SplitMix64 generator.

    A torch.Generator would have to be seeded by a number read back from the device.
    """
    x = seed + counter * -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    out: Tensor = (x ^ _shift(x, 31)) & (2**63 - 1)
    return out


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, filling with zeros: int64 stands for unsigned numbers."""
    out: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return out


def _rank() -> int:
    distributed = torch.distributed
    return int(distributed.get_rank()) if distributed.is_available() and distributed.is_initialized() else 0


def _of_all_processes(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks, so that every process keeps the same memory."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)
