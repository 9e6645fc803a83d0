"""s4g-ray: Sample4Geo cross-view geo-localisation as a distributed system on Ray.

Cross-view geo-localisation matches a query photo (ground, drone, map) against a gallery of aerial
reference tiles with known coordinates. The method is Sample4Geo (arXiv 2303.11851): one shared encoder,
symmetric InfoNCE, and batches built from geographic and visual neighbors.
"""

__version__ = "0.1.0"
