"""Maps of whole scenes: GeoTIFF in, GeoTIFF out."""
