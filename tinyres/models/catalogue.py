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
                   "fail" where it was above 20; for ImageNet top-1 / top-5 on the validation set; "" where the paper
                   has a curve or no error
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
    return [
        Entry(name, make, arguments, paper, table, dataset, error, parameters, multiply_adds)
        for paper, table, dataset, make, rows in _TABLES
        for name, arguments, error, parameters, multiply_adds in rows
    ]


# (paper, table, data set, maker, rows); a row is (name, arguments, error, parameters, multiply-adds). Errors on
# ImageNet are of 10-crop testing in 2015, of one crop of 320 x 320 in 2016, for ResNet-101 of 224 x 224.
_TABLES: list[tuple[str, str, str, Callable[..., Module], list[tuple[str, dict[str, Any], str, int, int]]]] = [
    ("2015", "Table 2", "ImageNet", imagenet_resnet, [
        ("plain18", {"depth": 18, "plain": True}, "27.94", 11_515_688, 1_794_805_760),
        ("resnet18-A", {"depth": 18, "shortcut": "A"}, "27.88", 11_515_688, 1_794_805_760),
    ]),
    ("2015", "Table 3", "ImageNet", imagenet_resnet, [
        ("plain34", {"depth": 34, "plain": True}, "28.54 / 10.02", 21_623_848, 3_644_493_824),
        ("resnet34-A", {"depth": 34, "shortcut": "A"}, "25.03 / 7.76", 21_623_848, 3_644_493_824),
        ("resnet34-B", {"depth": 34, "shortcut": "B"}, "24.52 / 7.46", 21_797_672, 3_663_761_408),
        ("resnet34-C", {"depth": 34, "shortcut": "C"}, "24.19 / 7.40", 22_716_840, 3_830_747_136),
        ("resnet50", {"depth": 50}, "22.85 / 6.71", 25_557_032, 3_857_973_248),
        ("resnet101", {"depth": 101}, "21.75 / 6.05", 44_549_160, 7_570_194_432),
        ("resnet152", {"depth": 152}, "21.43 / 5.71", 60_192_808, 11_282_415_616),
    ]),
    ("2015", "Table 3", "ImageNet", vgg, [
        ("vgg16", {"depth": 16}, "28.07 / 9.33", 138_357_544, 15_470_264_320),
    ]),
    ("2015", "Section 4.1", "ImageNet", vgg, [
        ("vgg19", {"depth": 19}, "", 143_667_240, 19_632_062_464),
    ]),
    ("2015", "Fig. 6", "CIFAR-10", cifar_resnet, [
        ("plain20", {"depth": 20, "plain": True}, "", 269_722, 40_551_040),
        ("plain32", {"depth": 32, "plain": True}, "", 464_154, 68_862_592),
        ("plain44", {"depth": 44, "plain": True}, "", 658_586, 97_174_144),
        ("plain56", {"depth": 56, "plain": True}, "", 853_018, 125_485_696),
        ("plain110", {"depth": 110, "plain": True}, "> 60", 1_727_962, 252_887_680),
    ]),
    ("2015", "Table 6", "CIFAR-10", cifar_resnet, [
        ("resnet20", {"depth": 20}, "8.75", 269_722, 40_551_040),
        ("resnet32", {"depth": 32}, "7.51", 464_154, 68_862_592),
        ("resnet44", {"depth": 44}, "7.17", 658_586, 97_174_144),
        ("resnet56", {"depth": 56}, "6.97", 853_018, 125_485_696),
        ("resnet110", {"depth": 110}, "6.43 (6.61 +- 0.16)", 1_727_962, 252_887_680),
        ("resnet1202", {"depth": 1202}, "7.93", 19_421_274, 2_829_238_912),
    ]),
    ("2016", "Table 1", "CIFAR-10", cifar_resnet, [
        ("resnet110-constant-0-1", {"depth": 110, "skip": "constant", "scales": (0, 1)},
         "fail", 1_727_962, 252_887_680),
        ("resnet110-constant-0.5-1", {"depth": 110, "skip": "constant", "scales": (0.5, 1)},
         "fail", 1_727_962, 252_887_680),
        ("resnet110-constant-0.5-0.5", {"depth": 110, "skip": "constant", "scales": (0.5, 0.5)},
         "12.35", 1_727_962, 252_887_680),
        ("resnet110-exclusive-gate-0", {"depth": 110, "skip": "exclusive_gate", "gate_bias": 0},
         "fail", 1_826_746, 267_043_456),
        ("resnet110-exclusive-gate-6", {"depth": 110, "skip": "exclusive_gate", "gate_bias": -6},
         "8.70", 1_826_746, 267_043_456),
        ("resnet110-exclusive-gate-7", {"depth": 110, "skip": "exclusive_gate", "gate_bias": -7},
         "9.81", 1_826_746, 267_043_456),
        ("resnet110-shortcut-gate-0", {"depth": 110, "skip": "shortcut_gate", "gate_bias": 0},
         "12.86", 1_826_746, 267_043_456),
        ("resnet110-shortcut-gate-6", {"depth": 110, "skip": "shortcut_gate", "gate_bias": -6},
         "6.91", 1_826_746, 267_043_456),
        ("resnet110-conv1x1", {"depth": 110, "skip": "conv1x1"}, "12.22", 1_826_202, 266_781_312),
        ("resnet110-dropout", {"depth": 110, "skip": "dropout"}, "fail", 1_727_962, 252_887_680),
    ]),
    ("2016", "Table 2", "CIFAR-10", cifar_resnet, [
        ("resnet110-original", {"depth": 110}, "6.61", 1_727_962, 252_887_680),
        ("resnet110-bn-after-add", {"depth": 110, "unit": "bn_after_add"}, "8.17", 1_727_962, 252_887_680),
        ("resnet110-relu-before-add", {"depth": 110, "unit": "relu_before_add"}, "7.84", 1_727_962, 252_887_680),
        ("resnet110-relu-preactivation", {"depth": 110, "unit": "relu_preactivation"}, "6.71", 1_727_962, 252_887_680),
        ("resnet110-full-preactivation", {"depth": 110, "unit": "full_preactivation"}, "6.37", 1_727_962, 252_887_680),
        ("resnet164-original", {"depth": 164}, "5.93", 1_704_154, 244_500_992),
        ("resnet164-bn-after-add", {"depth": 164, "unit": "bn_after_add"}, "6.50", 1_704_154, 244_500_992),
        ("resnet164-relu-before-add", {"depth": 164, "unit": "relu_before_add"}, "6.14", 1_704_154, 244_500_992),
        ("resnet164-relu-preactivation", {"depth": 164, "unit": "relu_preactivation"}, "5.91", 1_704_154, 244_500_992),
        ("resnet164-full-preactivation", {"depth": 164, "unit": "full_preactivation"}, "5.46", 1_703_258, 244_500_992),
    ]),
    ("2016", "Table 3", "CIFAR-10", cifar_resnet, [
        ("resnet110-1layer-original", {"depth": 110, "block": "single"}, "9.90", 1_727_962, 252_887_680),
        ("resnet110-1layer-full-preactivation", {"depth": 110, "block": "single", "unit": "full_preactivation"},
         "8.91", 1_727_962, 252_887_680),
        ("resnet1001-original", {"depth": 1001}, "7.61", 10_328_602, 1_487_849_984),
        ("resnet1001-full-preactivation", {"depth": 1001, "unit": "full_preactivation"},
         "4.92 (4.89 +- 0.14)", 10_327_706, 1_487_849_984),
    ]),
    ("2016", "Table 3", "CIFAR-100", cifar_resnet, [
        ("resnet164-original-cifar100", {"depth": 164, "num_classes": 100}, "25.16", 1_727_284, 244_524_032),
        ("resnet164-full-preactivation-cifar100", {"depth": 164, "unit": "full_preactivation", "num_classes": 100},
         "24.33", 1_726_388, 244_524_032),
        ("resnet1001-original-cifar100", {"depth": 1001, "num_classes": 100}, "27.82", 10_351_732, 1_487_873_024),
        ("resnet1001-full-preactivation-cifar100", {"depth": 1001, "unit": "full_preactivation", "num_classes": 100},
         "22.71 (22.68 +- 0.22)", 10_350_836, 1_487_873_024),
    ]),
    ("2016", "Section 5", "ImageNet", imagenet_resnet, [
        ("resnet101-bn-after-add", {"depth": 101, "unit": "bn_after_add"}, "24.6 / 7.5", 44_549_160, 7_570_194_432),
    ]),
    ("2016", "Table 5", "ImageNet", imagenet_resnet, [
        ("resnet152-original", {"depth": 152}, "21.3 / 5.5", 60_192_808, 11_282_415_616),
        ("resnet152-full-preactivation", {"depth": 152, "unit": "full_preactivation"},
         "21.1 / 5.5", 60_185_128, 11_282_415_616),
        ("resnet200-original", {"depth": 200}, "21.8 / 6.0", 64_673_832, 14_776_270_848),
        ("resnet200-full-preactivation", {"depth": 200, "unit": "full_preactivation"},
         "20.7 / 5.3", 64_666_152, 14_776_270_848),
    ]),
]  # fmt: skip
