"""Networks with a carried forward-mode derivative; see :mod:`cmbench.networks.base`.

Nothing is imported here: configurations and the catalogue are usable without torch.
"""
