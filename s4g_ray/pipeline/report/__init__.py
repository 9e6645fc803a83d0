"""report.html: one self-contained page about a run.

page      write_report: the page, from a run's folder
examples  retrievals and mined negatives, with pictures
charts    curves and the map
"""
