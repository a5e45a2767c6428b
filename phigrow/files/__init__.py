"""Write files and folders whole or not at all, and read untrusted ones strictly."""
