"""The networks of this package, by name. Imports no torch."""

from __future__ import annotations

from typing import Any, NamedTuple


class CatalogEntry(NamedTuple):
    """Name, import path of the class, title and source of a network."""

    name: str
    factory: str
    title: str
    reference: str = ""


NETWORKS: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        "unet-tiny",
        "cmbench.networks.unet_tiny:UNetTiny",
        "small convolutional network or U-Net for 8x8 to 32x32 images",
        "DDPM++ blocks, arXiv:2011.13456",
    ),
    CatalogEntry(
        "mlp", "cmbench.networks.mlp:MLP", "residual MLP for 2-D mixtures and very small images"
    ),
    CatalogEntry(
        "ddpmpp",
        "cmbench.networks.song_unet:DDPMPP",
        "DDPM++ (55.7M parameters at the CIFAR-10 settings)",
        "arXiv:2011.13456, arXiv:2206.00364",
    ),
    CatalogEntry(
        "ncsnpp",
        "cmbench.networks.song_unet:NCSNPP",
        "NCSN++ (56.4M parameters at the CIFAR-10 settings)",
        "arXiv:2011.13456, arXiv:2206.00364",
    ),
    CatalogEntry(
        "adm",
        "cmbench.networks.adm_unet:ADM",
        "ADM (295.9M parameters at the ImageNet-64 settings)",
        "arXiv:2105.05233",
    ),
    CatalogEntry(
        "edm2",
        "cmbench.networks.edm2_unet:EDM2",
        "EDM2, magnitude-preserving (280.2M parameters at size S)",
        "arXiv:2312.02696",
    ),
)

#: Published sizes: name of the network and what departs from its defaults.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp-cifar10": ("ddpmpp", {"augment_dim": 9}),
    "ncsnpp-cifar10": ("ncsnpp", {"augment_dim": 9}),
    # iCT's: twice the depth, no augmentation labels; on ImageNet-64 without AdaGN.
    "ncsnpp-cifar10-deep": ("ncsnpp", {"blocks": 8}),
    "adm-imagenet64": ("adm", {}),
    "adm-imagenet64-deep": ("adm", {"blocks": 6, "conditioning": "additive"}),
    "edm2-xs": ("edm2", {"channels": 128}),
    "edm2-s": ("edm2", {"channels": 192}),
    "edm2-m": ("edm2", {"channels": 256}),
    "edm2-l": ("edm2", {"channels": 320}),
    "edm2-xl": ("edm2", {"channels": 384}),
    "edm2-xxl": ("edm2", {"channels": 448}),
}
