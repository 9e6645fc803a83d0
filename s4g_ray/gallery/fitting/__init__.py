"""Fit a gallery's calibration on held-out queries, and assess it on others. In the order of use:

calibrate          calibrate(): gallery and data set into calibration.json and a report
held_out           HeldOut: the candidates of queries whose true position is known
query_search       read held-out queries and search the gallery for them, as `s4g locate` does
calibration_fit    fit a Calibration by maximum likelihood, its radii by cross-fitting
typical_queries    the direction in which usual queries differ from those from outside
none_fit           the model that tells whether a query lies outside
sampling_errors    intervals and standard errors of what is reported
assessment         Assessment: errors of probabilities, coverage of radii, what `none` saves
refinement_trials  refine held-out queries by their best candidates
inlier_choice      choose how many inliers a refined position needs, and of which photos
"""
