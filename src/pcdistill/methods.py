"""The table of methods: a recipe's method name -> its loss and its objective. Importing it needs no torch.

A method stands in two places: its file in `pcdistill/losses/`, and its entry here.
"""

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """One entry of the table.

    Attributes:
        path: "module:Class" of the loss; importing it imports torch.
        kind: what the loss compares.
        source: the paper.
        summary: one line for `pcdistill list`.
        terms: the whole objective that the method's name stands for in `--method NAME`: recipe terms.
        group: the methods it is compared with (`compare --methods all-logit`), where that is not its kind.
    """

    path: str
    kind: Literal["logits", "features", "pyramids"]
    source: str
    summary: str
    terms: tuple[dict[str, Any], ...] = field(default=())
    group: Literal["logits", "features"] | None = None

    def load(self) -> type:
        """The class; imports its module."""
        module, name = self.path.split(":")
        loaded: type = getattr(importlib.import_module(module), name)
        return loaded


CE = {"method": "ce", "weight": 1.0}
DETECTOR = {"method": "detector", "weight": 1.0}

METHODS: dict[str, Method] = {
    "ce": Method(
        "pcdistill.losses.ce:CELoss", "logits", "standard", "cross-entropy with the labels", ({"method": "ce"},)
    ),
    "kd": Method(
        "pcdistill.losses.kd:KDLoss",
        "logits",
        "arXiv 1503.02531",
        "softened class probabilities (Hinton)",
        ({"method": "ce", "weight": 0.1}, {"method": "kd", "weight": 0.9, "temperature": 4.0}),
    ),
    "lskd": Method(
        "pcdistill.losses.lskd:LSKDLoss",
        "logits",
        "arXiv 2403.01427",
        "KD on standardised logits; any other term takes `standardize: true`",
        ({"method": "ce", "weight": 0.1}, {"method": "lskd", "weight": 9.0, "temperature": 2.0}),
    ),
    "eakd": Method(
        "pcdistill.losses.eakd:EAKDLoss",
        "logits",
        "arXiv 2311.13621",
        "KD, weighted by the entropies of teacher and student; any other term takes `entropy_weighting: true`",
        ({"method": "ce", "weight": 0.1}, {"method": "eakd", "weight": 0.9}),
    ),
    "pcd": Method(
        "pcdistill.losses.pcd:PCDLoss",
        "logits",
        "arXiv 2505.24310",
        "progressive class-level distillation, as the paper defines it",
        (CE, {"method": "pcd", "weight": 1.0}),
    ),
    "pcd-released": Method(
        "pcdistill.losses.pcd_released:PCDReleasedLoss",
        "logits",
        "arXiv 2505.24310, authors' code",
        "what the released code of PCD computes, for comparison",
        (CE, {"method": "pcd-released", "weight": 1.0, "warmup_epochs": 20}),
    ),
    "pld": Method(
        "pcdistill.losses.pld:PLDLoss",
        "logits",
        "arXiv 2506.12542",
        "the teacher's ranking of the classes, the label first; no cross-entropy",
        ({"method": "pld", "weight": 1.0},),
    ),
    "dkd": Method(
        "pcdistill.losses.dkd:DKDLoss",
        "logits",
        "arXiv 2203.08679",
        "KD split into target against rest and classes within the rest",
        (CE, {"method": "dkd", "weight": 1.0, "warmup_epochs": 20}),
    ),
    "nkd": Method(
        "pcdistill.losses.nkd:NKDLoss",
        "logits",
        "arXiv 2303.13005",
        "soft target cross-entropy, and the rest normalised",
        (CE, {"method": "nkd", "weight": 1.0}),
    ),
    "mlkd": Method(
        "pcdistill.losses.mlkd:MLKDLoss",
        "logits",
        "CVPR 2023",
        "instance, batch and class level at five temperatures; two views of each image",
        ({"method": "ce", "weight": 0.2}, {"method": "mlkd", "weight": 0.9}),
    ),
    "mlkd-noaug": Method(
        "pcdistill.losses.mlkd:MLKDNoAugLoss",
        "logits",
        "CVPR 2023",
        "MLKD on one view, at the cost of the other methods",
        ({"method": "ce", "weight": 0.1}, {"method": "mlkd-noaug", "weight": 0.9}),
    ),
    "ctkd": Method(
        "pcdistill.losses.ctkd:CTKDLoss",
        "logits",
        "arXiv 2211.16231",
        "KD at a temperature learned against the student",
        ({"method": "ce", "weight": 0.1}, {"method": "ctkd", "weight": 0.9}),
    ),
    "dist": Method(
        "pcdistill.losses.dist:DISTLoss",
        "logits",
        "arXiv 2205.10536",
        "correlation of rows and of columns instead of KL",
        (CE, {"method": "dist", "weight": 2.0}),
    ),
    "ikl": Method(
        "pcdistill.losses.ikl:IKLLoss",
        "logits",
        "arXiv 2305.13948",
        "differences of logits weighted by the class's mean probabilities, and a soft target",
        (CE, {"method": "ikl", "weight": 1.0, "warmup_epochs": 20}),
    ),
    "ttm": Method(
        "pcdistill.losses.ttm:TTMLoss",
        "logits",
        "arXiv 2402.11148",
        "the teacher's probabilities to a power, the student without temperature",
        (CE, {"method": "ttm", "weight": 45.0}),
    ),
    "wttm": Method(
        "pcdistill.losses.ttm:WTTMLoss",
        "logits",
        "arXiv 2402.11148",
        "TTM with samples weighted by how smooth the teacher is",
        (CE, {"method": "wttm", "weight": 4.0}),
    ),
    "clkd": Method(
        "pcdistill.losses.clkd:CLKDLoss",
        "logits",
        "arXiv 2211.14773",
        "normalised rows and columns of logits, and class correlation",
        # On raw logits the default correlation term grows with their fourth power, and swamps all else.
        ({"method": "ce", "weight": 0.1}, {"method": "clkd", "weight": 1.0, "correlation": "class-cosine"}),
    ),
    "ldrld": Method(
        "pcdistill.losses.ldrld:LDRLDLoss",
        "logits",
        "arXiv 2507.15911",
        "the student's best classes compared pair by pair",
        (CE, {"method": "ldrld", "weight": 1.0}),
    ),
    "cskd": Method(
        "pcdistill.losses.cskd:CSKDLoss",
        "logits",
        "arXiv 2311.14307",
        "cosine similarity over the batch, with a temperature per sample; two views of each image",
        ({"method": "ce", "weight": 2.0}, {"method": "cskd", "weight": 1.0}),
    ),
    "cskd-noaug": Method(
        "pcdistill.losses.cskd:CSKDNoAugLoss",
        "logits",
        "arXiv 2311.14307",
        "CSKD on one view, at the cost of the other methods",
        (CE, {"method": "cskd-noaug", "weight": 1.0}),
    ),
    "sdd": Method(
        "pcdistill.losses.sdd:SDDLoss",
        "features",
        "arXiv 2403.13512",
        "KD, DKD or NKD on the logits of regions of the image",
        ({"method": "ce", "weight": 0.1}, {"method": "sdd", "weight": 0.9}),
        group="logits",
    ),
    "rld": Method(
        "pcdistill.losses.rld:RLDLoss",
        "logits",
        "arXiv 2408.07703",
        "the teacher's confidence for the true class, and the classes it ranks below",
        (CE, {"method": "rld", "weight": 1.0, "warmup_epochs": 20}),
    ),
    "rc": Method(
        "pcdistill.losses.rc:RCLoss",
        "logits",
        "arXiv 2408.07703, baseline",
        "KD from the teacher and from the student's own corrected logits",
        (CE, {"method": "rc", "weight": 1.0}),
    ),
    "swap": Method(
        "pcdistill.losses.swap:SwapLoss",
        "logits",
        "arXiv 2408.07703, baseline LA",
        "KD after the teacher's mistakes are exchanged away; no cross-entropy",
        ({"method": "swap", "weight": 1.0},),
    ),
    "revision": Method(
        "pcdistill.losses.revision:RevisionLoss",
        "logits",
        "arXiv 2404.03693",
        "logits of a right teacher, revised probabilities of a wrong one",
        ({"method": "revision", "weight": 1.0},),
    ),
    "fitnet": Method(
        "pcdistill.losses.fitnet:FitNetLoss",
        "features",
        "arXiv 1412.6550",
        "one stage's feature map through a regressor",
        (CE, {"method": "fitnet", "weight": 100.0}),
    ),
    "at": Method(
        "pcdistill.losses.at:ATLoss",
        "features",
        "arXiv 1612.03928",
        "where each stage's feature map is active",
        (CE, {"method": "at", "weight": 1000.0}),
    ),
    "nst": Method(
        "pcdistill.losses.nst:NSTLoss",
        "features",
        "arXiv 1707.01219",
        "how each stage's channels are spread over places",
        (CE, {"method": "nst", "weight": 50.0}),
    ),
    "pkt": Method(
        "pcdistill.losses.pkt:PKTLoss",
        "features",
        "arXiv 1803.10837",
        "which samples are neighbours, as probabilities",
        (CE, {"method": "pkt", "weight": 30000.0}),
    ),
    "rkd": Method(
        "pcdistill.losses.rkd:RKDLoss",
        "features",
        "arXiv 1904.05068",
        "distances and angles between samples",
        (CE, {"method": "rkd", "weight": 1.0}),
    ),
    "sp": Method(
        "pcdistill.losses.sp:SPLoss",
        "features",
        "arXiv 1907.09682",
        "similarities of the samples of a batch",
        (CE, {"method": "sp", "weight": 3000.0}),
    ),
    "vid": Method(
        "pcdistill.losses.vid:VIDLoss",
        "features",
        "arXiv 1904.05835",
        "each stage's feature map predicted with a learned variance",
        (CE, {"method": "vid", "weight": 1.0}),
    ),
    "ofd": Method(
        "pcdistill.losses.ofd:OFDLoss",
        "features",
        "arXiv 1904.01866",
        "feature maps before the activation, where they matter after it",
        (CE, {"method": "ofd", "weight": 1e-3}),
    ),
    "crd": Method(
        "pcdistill.losses.crd:CRDLoss",
        "features",
        "arXiv 1910.10699",
        "the same image told from images of other classes, with a memory",
        (CE, {"method": "crd", "weight": 0.8}),
    ),
    "reviewkd": Method(
        "pcdistill.losses.reviewkd:ReviewKDLoss",
        "features",
        "arXiv 2104.09044",
        "each stage's feature map from fusions of all deeper ones",
        (CE, {"method": "reviewkd", "weight": 1.0, "warmup_epochs": 20}),
    ),
    "srrl": Method(
        "pcdistill.losses.srrl:SRRLLoss",
        "features",
        "ICLR 2021",
        "features, and what the teacher's classifier makes of them",
        (CE, {"method": "srrl", "weight": 1.0}),
    ),
    "simkd": Method(
        "pcdistill.losses.simkd:SimKDLoss",
        "features",
        "arXiv 2203.14001",
        "the teacher's classifier on projected features, alone; the student ships with it",
        ({"method": "simkd", "weight": 1.0},),
    ),
    "detector": Method(
        "pcdistill.losses.detector:DetectorLoss",
        "pyramids",
        "torchvision",
        "the detector's own losses, the term that every recipe for detectors has",
        (DETECTOR,),
    ),
    "fpn-fitnet": Method(
        "pcdistill.losses.fpn_fitnet:FPNFitNetLoss",
        "pyramids",
        "arXiv 1412.6550",
        "squared error of pyramid levels (FitNet)",
        (DETECTOR, {"method": "fpn-fitnet", "weight": 1.0}),
    ),
    "mgd": Method(
        "pcdistill.losses.mgd:MGDLoss",
        "pyramids",
        "arXiv 2205.01529",
        "pyramid levels generated from randomly masked ones",
        (DETECTOR, {"method": "mgd", "weight": 5e-7}),
    ),
    "dmkd": Method(
        "pcdistill.losses.dmkd:DMKDLoss",
        "pyramids",
        "arXiv 2309.02719, abstract",
        "pyramid levels generated from ones masked by spatial and by channel attention",
        (DETECTOR, {"method": "dmkd", "weight": 5e-7}),
    ),
    "fgd": Method(
        "pcdistill.losses.fgd:FGDLoss",
        "pyramids",
        "arXiv 2111.11837",
        "pyramid levels, foreground and background apart, attention and global relations",
        (DETECTOR, {"method": "fgd", "weight": 1.0}),
    ),
    "pkd": Method(
        "pcdistill.losses.pkd:PKDLoss",
        "pyramids",
        "arXiv 2207.02039",
        "correlation of pyramid levels",
        (DETECTOR, {"method": "pkd", "weight": 6.0}),
    ),
    "dfmsd": Method(
        "pcdistill.losses.dfmsd:DFMSDLoss",
        "pyramids",
        "arXiv 2407.13147, abstract",
        "dual masking of pyramid levels, object-aware, aligned, in stages; our equations",
        (DETECTOR, {"method": "dfmsd", "weight": 6.0}),
    ),
    "cwd": Method(
        "pcdistill.losses.cwd:CWDLoss",
        "pyramids",
        "arXiv 2011.13256",
        "where each channel of a pyramid level is active",
        (DETECTOR, {"method": "cwd", "weight": 5.0}),
    ),
    "acam": Method(
        "pcdistill.losses.acam:ACAMLoss",
        "pyramids",
        "ICCV 2025",
        "pyramid levels under masks that student and teacher learn together",
        (DETECTOR, {"method": "acam", "weight": 1.0}),
    ),
}
