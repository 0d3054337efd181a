"""A page in the browser: upload a scene, map it, see both on one map, download the files (`hf-seg demo`)."""
