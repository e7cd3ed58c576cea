"""The gateway's operations on instances ahead of requests, asked by boto3 as it is."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from templated.model.function import UpdateView
from tests.unit.fake_functions import FakeShifts
from tests.unit.lambda_client import Gate, create, refusal, talk, zipped

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
ARN = "arn:aws:lambda:us-east-1:000000000000:function:hello"


def test_an_update_whose_instances_are_not_ready(tmp_path: Path) -> None:
    """It is answered at once, and the waiter waits; numbered versions have nothing to wait for."""

    def work(gate: Gate) -> None:
        client, shifts = gate.client(), gate.functions.shifts
        assert isinstance(shifts, FakeShifts)
        create(client, Publish=True)
        shifts.updating["hello"] = UpdateView(done=False, wanted=3, ready=1)
        made = client.update_function_code(FunctionName="hello", ZipFile=zipped("y"))
        assert made["LastUpdateStatus"] == "InProgress" and made["State"] == "Active"
        assert made["LastUpdateStatusReason"].startswith("1 of 3 instances are ready")
        shown = client.get_function_configuration(FunctionName="hello", Qualifier="1")
        assert shown["LastUpdateStatus"] == "Successful"
        ready = threading.Timer(0.3, shifts.updating.clear)
        ready.start()
        waiter = client.get_waiter("function_updated_v2")
        waiter.wait(FunctionName="hello", WaiterConfig={"Delay": 0.2, "MaxAttempts": 50})
        ready.join()
        assert shifts.updating == {} and shifts.hurried == []

    talk(tmp_path, work)


def test_provisioned_concurrency(tmp_path: Path) -> None:
    """For a version, or an alias, with how far it is; a page of all of them."""

    def work(gate: Gate) -> None:
        client = gate.client()
        create(client, Publish=True)
        for name in ("live", "slow", "broken"):
            client.create_alias(FunctionName="hello", Name=name, FunctionVersion="1")
        put, where = client.put_provisioned_concurrency_config, {"FunctionName": "hello"}
        made = put(**where, Qualifier="live", ProvisionedConcurrentExecutions=5)
        assert made["ResponseMetadata"]["HTTPStatusCode"] == 202
        assert made["RequestedProvisionedConcurrentExecutions"] == 5
        get = client.get_provisioned_concurrency_config
        found = get(FunctionName=f"{ARN}:live", Qualifier="live")
        assert (found["Status"], found["AvailableProvisionedConcurrentExecutions"]) == ("READY", 5)
        assert found["LastModified"].endswith("+0000") and "StatusReason" not in found
        put(**where, Qualifier="slow", ProvisionedConcurrentExecutions=1)
        slow = get(**where, Qualifier="slow")
        assert (slow["Status"], slow["AvailableProvisionedConcurrentExecutions"]) == (
            *("IN_PROGRESS", 0),
        )
        assert slow["AllocatedProvisionedConcurrentExecutions"] == 1
        put(**where, Qualifier="broken", ProvisionedConcurrentExecutions=1)
        broken = get(**where, Qualifier="broken")
        assert (broken["Status"], broken["StatusReason"]) == ("FAILED", "its init fails: no")
        put(**where, Qualifier="1", ProvisionedConcurrentExecutions=2)
        listed = client.list_provisioned_concurrency_configs(**where, MaxItems=3)
        arns = [one["FunctionArn"] for one in listed["ProvisionedConcurrencyConfigs"]]
        assert arns == [f"{ARN}:1", f"{ARN}:broken", f"{ARN}:live"]
        rest = client.list_provisioned_concurrency_configs(**where, Marker=listed["NextMarker"])
        assert len(rest["ProvisionedConcurrencyConfigs"]) == 1
        client.delete_provisioned_concurrency_config(**where, Qualifier="1")
        unknown = refusal(get, **where, Qualifier="1")
        assert unknown[:2] == (404, "ProvisionedConcurrencyConfigNotFoundException")
        delete = client.delete_provisioned_concurrency_config
        assert refusal(delete, **where, Qualifier="1")[0] == 404
        assert refusal(put, **where, Qualifier="9", ProvisionedConcurrentExecutions=1)[0] == 404
        latest = refusal(put, **where, Qualifier="$LATEST", ProvisionedConcurrentExecutions=1)
        assert latest[1] == "InvalidParameterValueException"
        much = refusal(put, **where, Qualifier="1", ProvisionedConcurrentExecutions=94)
        assert "101 instances, and functions.concurrency is 100" in much[2]
        few = refusal(client.put_function_concurrency, **where, ReservedConcurrentExecutions=6)
        assert few[1] == "InvalidParameterValueException"
        assert "5 for live + 1 for slow + 1 for broken = 7 instances" in few[2]
        client.delete_alias(**where, Name="slow")
        assert [p.qualifier for p in gate.functions.registry.provisioned("hello")] == [
            *("broken", "live"),
        ]
        entry = gate.audited()[-1]
        assert (entry.action, entry.target) == ("DeleteAlias", "hello")

    talk(tmp_path, work)
