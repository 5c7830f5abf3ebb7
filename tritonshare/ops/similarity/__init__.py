"""What similarity_weight, nearest and similarity_reduce share. Device code: kernels/similarity.py."""
