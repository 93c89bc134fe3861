"""The plugin contract: hook specs, the loader, and the records that plugins return."""

import pluggy

#: Decorator for hook implementations, in built-in and third-party plugins alike.
hookimpl = pluggy.HookimplMarker("cmbench")

__all__ = ["hookimpl"]
