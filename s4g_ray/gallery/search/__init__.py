"""Search a gallery for photos: what is asked, and the candidates that are found.

options             LocateOptions: number of candidates, where to search, turns
candidates          join the candidates of turned views, and those of overlapping cells
usable_calibration  a gallery's calibration, where it fits the search
appearance          Appearance: does a photo look like those of the calibration
refine              the exact position of an answer within its best candidates
ground_shapes       squares and circles as GeoJSON
map_view            MapView: the tiles that a map shows, few for the ground that they cover
"""
