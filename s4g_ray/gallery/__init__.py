"""References that answer where a photo was taken: tiles, embeddings, index and encoder.

gallery            Gallery: open a gallery, search it, encode photos, read tiles
query_encoder      QueryEncoder: embed photos in this process
description        facts about a gallery, as JSON and as a table
build              build a gallery, add tiles and remove them
relocation         name the folder of images anew, where they are not copied
update             GalleryUpdate: write the next version
store/             the files of a gallery: versions, tiles, images, embeddings
calibration        Calibration: scores into probabilities, a position with its radii, or `none`
ground_mass        GroundMass: probability on the ground, and its quantiles about a point
fitting/           fit a Calibration on held-out queries, and assess it on others
photos/            photos of files, folders and videos: decoded, upright, turned, with EXIF position
search/            what is asked; candidates joined on the ground; exact positions
locate             locate: photos into answers
answer             Answer: candidates, position and radii; as JSON and GeoJSON
refinement         refine_position: the exact position within a tile, by local features
opencv             import OpenCV, which is an extra

    from s4g_ray import open_gallery
    gallery = open_gallery("galleries/lake")
    ids, scores = gallery.search(gallery.encode(photos), k=10)
    answers = gallery.locate(["photo.jpg"], near=(40.9, -112.2), within_m=5000)
"""
