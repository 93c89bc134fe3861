"""The built-in methods, datasets, networks, metrics and extractors, registered as any plugin is."""
