"""s4g-ray: Sample4Geo cross-view geo-localisation as a distributed system on Ray.

Cross-view geo-localisation matches a query photo (ground, drone, map) against a gallery of aerial
reference tiles with known coordinates. The method is Sample4Geo (arXiv 2303.11851): one shared
encoder, symmetric InfoNCE, and batches built from geographic and visual neighbors.

    from s4g_ray import load_config, run
    result = run(load_config("configs/earth.yaml", ["train.epochs=3"]))

`__init__.pyi` lists the public names. Each is loaded when it is first asked for.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
