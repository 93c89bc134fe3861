"""The networks of this package, by name. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


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
        "small U-Net for 8x8 to 32x32 images",
        "DDPM++ blocks, arXiv:2011.13456",
    ),
    CatalogEntry(
        "mlp",
        "cmbench.networks.mlp:MLP",
        "residual MLP for 2-D mixtures and very small images",
    ),
)
