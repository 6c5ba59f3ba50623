"""Makes an S3 bucket if it is not there; the server is MLFLOW_S3_ENDPOINT_URL, the account as boto3 finds it."""

import os
import sys

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def make(name: str, endpoint: str | None) -> bool:
    """Whether it had to be made. SystemExit with one line if the server does not let this account."""
    client = boto3.client("s3", endpoint_url=endpoint)
    try:
        if name in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            return False
        client.create_bucket(Bucket=name)
    except (BotoCoreError, ClientError) as error:
        raise SystemExit(f"error: bucket {name} at {endpoint}: {error}; see S3_SECRET_KEY of .env") from None
    return True


if __name__ == "__main__":
    made = make(sys.argv[1], os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    print(f"bucket {sys.argv[1]}: {'made' if made else 'is there'}")
