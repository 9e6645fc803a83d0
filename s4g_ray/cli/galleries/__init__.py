"""Run the commands that find out where photos were taken.

gallery         `s4g gallery build | add | remove | relocate | info`
calibrate       `s4g gallery calibrate`
locate          `s4g locate`
locate_output   its answers as a table, JSON, GeoJSON or CSV
locate_rows     a row for each of many answers, as they come
locate_words    words and numbers of answers
locate_picture  an answer as a picture: photo, candidates, map
serve           `s4g serve`
"""
