"""Run the commands that find out where photos were taken.

gallery         `s4g gallery build | add | remove | info`
calibrate       `s4g gallery calibrate`
locate          `s4g locate`
locate_output   its answers as a table, JSON, GeoJSON or CSV
locate_picture  an answer as a picture: photo, candidates, map
serve           `s4g serve`
"""
