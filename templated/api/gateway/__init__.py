"""The gateway: AWS Lambda's API over TCP, for clients that people have. See docs/lambda-api.md."""
