"""Where artifacts and base models lie: presigned URLs, S3, Baseten, file systems, the Hub."""
