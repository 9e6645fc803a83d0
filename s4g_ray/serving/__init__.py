"""Serve a gallery: the service and its page.

map_view      choose the tiles that a map view shows
page/         the page: HTML, style, scripts, Leaflet and a world outline
"""
