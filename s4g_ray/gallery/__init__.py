"""References that answer where a photo was taken: tiles, embeddings, index and encoder.

calibration        Calibration: scores into probabilities, a position with its radii, or `none`
ground_mass        GroundMass: probability on the ground, and its quantiles about a point
calibration_fit    fit a Calibration on held-out queries
refinement         refine_position: the exact position within a tile, by local features
"""
