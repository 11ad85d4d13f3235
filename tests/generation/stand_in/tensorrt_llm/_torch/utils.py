def get_device_uuid(device_id: int) -> str:
    return f"GPU-of-worker-{device_id}"
