"""What every room uses: errors, files, images, versions, progress."""
