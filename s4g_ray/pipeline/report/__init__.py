"""report.html: one self-contained page about a run; comparison.html about several.

page               write_report: the page, from a run's folder
comparison         write_comparison: curves and results of several runs, and what differs in them
comparison_charts  curves of several runs
examples           retrievals, hardest mistakes and mined negatives, with pictures
charts             curves of one run
svg_charts         axes and colors of all charts
reliability        the calibration of a gallery
region_map         maps of true and predicted positions
map_frame          a map's rectangle of ground, scale and graticule
tile_mosaic        a map's background of the gallery's tiles
templates          fill the templates of the pages
"""
