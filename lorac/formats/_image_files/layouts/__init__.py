"""The layouts of methods, one class each."""

from lorac.formats._image_files.layout import AnyLayout
from lorac.formats._image_files.layouts.loras import DifferenceLayout, LoraLayout
from lorac.formats._image_files.layouts.products import LohaLayout, LokrLayout
from lorac.formats._image_files.layouts.rotations import RotationLayout
from lorac.formats._image_files.layouts.scales import GloraLayout, ScaleLayout

LAYOUTS: tuple[AnyLayout, ...] = (
    LoraLayout(),
    LohaLayout(),
    LokrLayout(),
    RotationLayout(),
    ScaleLayout(),
    GloraLayout(),
    DifferenceLayout(),
)
