"""Convert further published data sets, and find the root of an archive.

archive_root   the folder of an archive where its data set lies, found by its landmarks
drone_folders  numbered folders of drone and satellite images, and the rows of both
split_names    which folders of an archive are train, and which test
sues200        SUES-200: drone and satellite images at four heights
denseuav       DenseUAV: drone images of campuses at three heights, satellite images of two years
gta_uav        GTA-UAV: drone images of a game's map, tiles of four zoom levels
uav_visloc     UAV-VisLoc: photos of fixed-wing drones, matched with tiles of satellite maps
cvcities       CV-Cities: street panoramas and satellite images of sixteen cities

    from s4g_ray.datasets.published import sues200
    dataset = sues200.convert("SUES-200-512x512/", "data/sues200")
"""
