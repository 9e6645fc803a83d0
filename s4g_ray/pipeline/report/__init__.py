"""Report.html.

page      write_report: report.html
examples  retrievals and mined negatives, with pictures
charts    curves and the map
"""
