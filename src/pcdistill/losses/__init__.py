"""The losses, usable in anybody's training loop: ``from pcdistill.losses import pcd_loss``.

Public are the names in each file's `__all__`; `pcdistill.methods` says which name in a recipe is which class.
"""

from pcdistill.losses.acam import *
from pcdistill.losses.at import *
from pcdistill.losses.base import *
from pcdistill.losses.ce import *
from pcdistill.losses.clkd import *
from pcdistill.losses.crd import *
from pcdistill.losses.cskd import *
from pcdistill.losses.ctkd import *
from pcdistill.losses.cwd import *
from pcdistill.losses.detector import *
from pcdistill.losses.dfmsd import *
from pcdistill.losses.dist import *
from pcdistill.losses.dkd import *
from pcdistill.losses.dmkd import *
from pcdistill.losses.eakd import *
from pcdistill.losses.fgd import *
from pcdistill.losses.fitnet import *
from pcdistill.losses.fpn_fitnet import *
from pcdistill.losses.ikl import *
from pcdistill.losses.kd import *
from pcdistill.losses.ldrld import *
from pcdistill.losses.lskd import *
from pcdistill.losses.mgd import *
from pcdistill.losses.mlkd import *
from pcdistill.losses.nkd import *
from pcdistill.losses.nst import *
from pcdistill.losses.ofd import *
from pcdistill.losses.pcd import *
from pcdistill.losses.pcd_released import *
from pcdistill.losses.pkd import *
from pcdistill.losses.pkt import *
from pcdistill.losses.pld import *
from pcdistill.losses.rc import *
from pcdistill.losses.reviewkd import *
from pcdistill.losses.revision import *
from pcdistill.losses.rkd import *
from pcdistill.losses.rld import *
from pcdistill.losses.sdd import *
from pcdistill.losses.simkd import *
from pcdistill.losses.sp import *
from pcdistill.losses.srrl import *
from pcdistill.losses.swap import *
from pcdistill.losses.ttm import *
from pcdistill.losses.vid import *
