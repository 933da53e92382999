"""
The data sets that are known by name: SmallShapes, which is drawn, and the public ones of
docs/public_data.md, which ``tools/convert_dataset.py`` converts. Importing this package registers
them; no file is touched before first use.

To add a public data set: one file beside these, with a converter and a call of
:func:`cbbl_d2.data.datasets.public_data.register_public` for each split (``hit_uav.py`` is the
shortest example), and its name in the line below. ``tools/convert_dataset.py`` calls the converter.
"""

from . import ai_tod, hit_uav, small_shapes, tiny_person, visdrone  # noqa: F401
