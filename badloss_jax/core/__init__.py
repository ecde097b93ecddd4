"""What knows nothing of the subject: errors, files, seeds, hashes, progress, processes, devices, order of examples.

Imports nothing of the package. Begin with `errors`, which says how everything here fails, and `processes`.
"""

__version__ = "0.1.0"
