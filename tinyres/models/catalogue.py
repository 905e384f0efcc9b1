"""Every network for which the two papers print an error, with its sizes and that error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tinyres.models.cifar import cifar_resnet
from tinyres.models.imagenet import imagenet_resnet
from tinyres.models.vgg import vgg
from tinyres.nn import Module


class Entry(NamedTuple):
    """A network of the papers.

    name           of its own, such as "resnet110-dropout"
    make           the function that makes it, and ...
    arguments      ... the arguments with which it does; `build()` calls it
    paper, table   where the error stands: "2015" or "2016", "Table 6"
    dataset        "CIFAR-10", "CIFAR-100" or "ImageNet"
    error          the test error as printed, in percent: for CIFAR the median of 5 runs where there were several,
                   "fail" where it was above 20; for ImageNet top-1 / top-5 on the validation set
    parameters     weights, biases, and batch norm's scales and shifts
    multiply_adds  of convolutions and linear layers, for one 32x32 or 224x224 image
    """

    name: str
    make: Callable[..., Module]
    arguments: dict[str, Any]
    paper: str
    table: str
    dataset: str
    error: str
    parameters: int
    multiply_adds: int

    def build(self, **changes: Any) -> Module:
        """The network, with some of its arguments changed."""
        return self.make(**{**self.arguments, **changes})


def catalogue() -> list[Entry]:
    """All entries, in the papers' order."""
    return [Entry(*row) for row in (*_IMAGENET_2015, *_CIFAR_2015, *_CIFAR_2016, *_IMAGENET_2016)]


def _cifar(depth, **arguments):
    return cifar_resnet, {"depth": depth, **arguments}


def _imagenet(depth, **arguments):
    return imagenet_resnet, {"depth": depth, **arguments}


# 10-crop testing.
_IMAGENET_2015 = [
    ("plain18", *_imagenet(18, plain=True), "2015", "Table 2", "ImageNet", "27.94", 11_515_688, 1_794_805_760),
    ("resnet18-A", *_imagenet(18, shortcut="A"), "2015", "Table 2", "ImageNet", "27.88", 11_515_688, 1_794_805_760),
    ("plain34", *_imagenet(34, plain=True), "2015", "Table 3", "ImageNet", "28.54 / 10.02", 21_623_848, 3_644_493_824),
    ("resnet34-A", *_imagenet(34, shortcut="A"), "2015", "Table 3", "ImageNet", "25.03 / 7.76", 21_623_848, 3_644_493_824),
    ("resnet34-B", *_imagenet(34, shortcut="B"), "2015", "Table 3", "ImageNet", "24.52 / 7.46", 21_797_672, 3_663_761_408),
    ("resnet34-C", *_imagenet(34, shortcut="C"), "2015", "Table 3", "ImageNet", "24.19 / 7.40", 22_716_840, 3_830_747_136),
    ("resnet50", *_imagenet(50), "2015", "Table 3", "ImageNet", "22.85 / 6.71", 25_557_032, 3_857_973_248),
    ("resnet101", *_imagenet(101), "2015", "Table 3", "ImageNet", "21.75 / 6.05", 44_549_160, 7_570_194_432),
    ("resnet152", *_imagenet(152), "2015", "Table 3", "ImageNet", "21.43 / 5.71", 60_192_808, 11_282_415_616),
    ("vgg16", vgg, {"depth": 16}, "2015", "Table 3", "ImageNet", "28.07 / 9.33", 138_357_544, 15_470_264_320),
    ("vgg19", vgg, {"depth": 19}, "2015", "Section 4.1", "ImageNet", "", 143_667_240, 19_632_062_464),
]

_CIFAR_2015 = [
    ("plain20", *_cifar(20, plain=True), "2015", "Fig. 6", "CIFAR-10", "", 269_722, 40_551_040),
    ("plain32", *_cifar(32, plain=True), "2015", "Fig. 6", "CIFAR-10", "", 464_154, 68_862_592),
    ("plain44", *_cifar(44, plain=True), "2015", "Fig. 6", "CIFAR-10", "", 658_586, 97_174_144),
    ("plain56", *_cifar(56, plain=True), "2015", "Fig. 6", "CIFAR-10", "", 853_018, 125_485_696),
    ("plain110", *_cifar(110, plain=True), "2015", "Fig. 6", "CIFAR-10", "> 60", 1_727_962, 252_887_680),
    ("resnet20", *_cifar(20), "2015", "Table 6", "CIFAR-10", "8.75", 269_722, 40_551_040),
    ("resnet32", *_cifar(32), "2015", "Table 6", "CIFAR-10", "7.51", 464_154, 68_862_592),
    ("resnet44", *_cifar(44), "2015", "Table 6", "CIFAR-10", "7.17", 658_586, 97_174_144),
    ("resnet56", *_cifar(56), "2015", "Table 6", "CIFAR-10", "6.97", 853_018, 125_485_696),
    ("resnet110", *_cifar(110), "2015", "Table 6", "CIFAR-10", "6.43 (6.61 +- 0.16)", 1_727_962, 252_887_680),
    ("resnet1202", *_cifar(1202), "2015", "Table 6", "CIFAR-10", "7.93", 19_421_274, 2_829_238_912),
]

_EXCLUSIVE, _SHORTCUT_ONLY = "exclusive_gate", "shortcut_gate"
_CIFAR_2016 = [
    # Table 1: the skips; the unit is the original one
    ("resnet110-constant-0-1", *_cifar(110, skip="constant", scales=(0, 1)), "2016", "Table 1", "CIFAR-10", "fail", 1_727_962, 252_887_680),
    ("resnet110-constant-0.5-1", *_cifar(110, skip="constant", scales=(0.5, 1)), "2016", "Table 1", "CIFAR-10", "fail", 1_727_962, 252_887_680),
    ("resnet110-constant-0.5-0.5", *_cifar(110, skip="constant", scales=(0.5, 0.5)), "2016", "Table 1", "CIFAR-10", "12.35", 1_727_962, 252_887_680),
    ("resnet110-exclusive-gate-0", *_cifar(110, skip=_EXCLUSIVE, gate_bias=0), "2016", "Table 1", "CIFAR-10", "fail", 1_826_746, 267_043_456),
    ("resnet110-exclusive-gate-6", *_cifar(110, skip=_EXCLUSIVE, gate_bias=-6), "2016", "Table 1", "CIFAR-10", "8.70", 1_826_746, 267_043_456),
    ("resnet110-exclusive-gate-7", *_cifar(110, skip=_EXCLUSIVE, gate_bias=-7), "2016", "Table 1", "CIFAR-10", "9.81", 1_826_746, 267_043_456),
    ("resnet110-shortcut-gate-0", *_cifar(110, skip=_SHORTCUT_ONLY, gate_bias=0), "2016", "Table 1", "CIFAR-10", "12.86", 1_826_746, 267_043_456),
    ("resnet110-shortcut-gate-6", *_cifar(110, skip=_SHORTCUT_ONLY, gate_bias=-6), "2016", "Table 1", "CIFAR-10", "6.91", 1_826_746, 267_043_456),
    ("resnet110-conv1x1", *_cifar(110, skip="conv1x1"), "2016", "Table 1", "CIFAR-10", "12.22", 1_826_202, 266_781_312),
    ("resnet110-dropout", *_cifar(110, skip="dropout"), "2016", "Table 1", "CIFAR-10", "fail", 1_727_962, 252_887_680),
    # Table 2: the orders of activations
    ("resnet110-original", *_cifar(110), "2016", "Table 2", "CIFAR-10", "6.61", 1_727_962, 252_887_680),
    ("resnet110-bn-after-add", *_cifar(110, unit="bn_after_add"), "2016", "Table 2", "CIFAR-10", "8.17", 1_727_962, 252_887_680),
    ("resnet110-relu-before-add", *_cifar(110, unit="relu_before_add"), "2016", "Table 2", "CIFAR-10", "7.84", 1_727_962, 252_887_680),
    ("resnet110-relu-preactivation", *_cifar(110, unit="relu_preactivation"), "2016", "Table 2", "CIFAR-10", "6.71", 1_727_962, 252_887_680),
    ("resnet110-full-preactivation", *_cifar(110, unit="full_preactivation"), "2016", "Table 2", "CIFAR-10", "6.37", 1_727_962, 252_887_680),
    ("resnet164-original", *_cifar(164), "2016", "Table 2", "CIFAR-10", "5.93", 1_704_154, 244_500_992),
    ("resnet164-bn-after-add", *_cifar(164, unit="bn_after_add"), "2016", "Table 2", "CIFAR-10", "6.50", 1_703_258, 244_500_992),
    ("resnet164-relu-before-add", *_cifar(164, unit="relu_before_add"), "2016", "Table 2", "CIFAR-10", "6.14", 1_704_154, 244_500_992),
    ("resnet164-relu-preactivation", *_cifar(164, unit="relu_preactivation"), "2016", "Table 2", "CIFAR-10", "5.91", 1_704_154, 244_500_992),
    ("resnet164-full-preactivation", *_cifar(164, unit="full_preactivation"), "2016", "Table 2", "CIFAR-10", "5.46", 1_703_258, 244_500_992),
    # Table 3: both units at other depths and with 100 classes
    ("resnet110-1layer-original", *_cifar(110, block="single"), "2016", "Table 3", "CIFAR-10", "9.90", 1_727_962, 252_887_680),
    ("resnet110-1layer-full-preactivation", *_cifar(110, block="single", unit="full_preactivation"), "2016", "Table 3", "CIFAR-10", "8.91", 1_727_962, 252_887_680),
    ("resnet1001-original", *_cifar(1001), "2016", "Table 3", "CIFAR-10", "7.61", 10_328_602, 1_487_849_984),
    ("resnet1001-full-preactivation", *_cifar(1001, unit="full_preactivation"), "2016", "Table 3", "CIFAR-10", "4.92 (4.89 +- 0.14)", 10_327_706, 1_487_849_984),
    ("resnet164-original-cifar100", *_cifar(164, num_classes=100), "2016", "Table 3", "CIFAR-100", "25.16", 1_727_284, 244_524_032),
    ("resnet164-full-preactivation-cifar100", *_cifar(164, unit="full_preactivation", num_classes=100), "2016", "Table 3", "CIFAR-100", "24.33", 1_726_388, 244_524_032),
    ("resnet1001-original-cifar100", *_cifar(1001, num_classes=100), "2016", "Table 3", "CIFAR-100", "27.82", 10_351_732, 1_487_873_024),
    ("resnet1001-full-preactivation-cifar100", *_cifar(1001, unit="full_preactivation", num_classes=100), "2016", "Table 3", "CIFAR-100", "22.71 (22.68 +- 0.22)", 10_350_836, 1_487_873_024),
]  # fmt: skip

# One crop of 320 x 320; ResNet-101 of 224 x 224.
_IMAGENET_2016 = [
    ("resnet101-bn-after-add", *_imagenet(101, unit="bn_after_add"), "2016", "Section 5", "ImageNet", "24.6 / 7.5", 44_541_480, 7_570_194_432),
    ("resnet152-original", *_imagenet(152), "2016", "Table 5", "ImageNet", "21.3 / 5.5", 60_192_808, 11_282_415_616),
    ("resnet152-full-preactivation", *_imagenet(152, unit="full_preactivation"), "2016", "Table 5", "ImageNet", "21.1 / 5.5", 60_185_128, 11_282_415_616),
    ("resnet200-original", *_imagenet(200), "2016", "Table 5", "ImageNet", "21.8 / 6.0", 64_673_832, 14_776_270_848),
    ("resnet200-full-preactivation", *_imagenet(200, unit="full_preactivation"), "2016", "Table 5", "ImageNet", "20.7 / 5.3", 64_666_152, 14_776_270_848),
]  # fmt: skip
