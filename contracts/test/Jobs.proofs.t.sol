// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Jobs} from "../src/Jobs.sol";
import {TestToken} from "../src/TestToken.sol";
import {Vault} from "../src/Vault.sol";
import {Workers} from "../src/Workers.sol";
import {IJobs} from "../src/interfaces/IJobs.sol";
import {Lite} from "./Lite.sol";

/// @dev Proved by halmos for every value of the arguments: `scripts/check-proofs`. Client and worker are plain addresses that
/// call themselves (those of keys are symbols, which might be equal); the signatures are the signature zoo's affair, but for the
/// quote, which the worker's contract signs. This test is its own module, so it can dispute and resolve.
contract JobsProofs is Lite {
    address private constant CLIENT = address(0x1111);
    uint128 private constant PURSE = 1_000_000;
    bytes32 private constant RESULT = "a result";

    Vault private vault;
    Jobs private jobs;
    TestToken private token;
    IJobs.Quote private quote;

    function setUp() public {
        vm.warp(1_800_000_000);
        vault = new Vault(address(this), 0);
        Workers workers = new Workers(vault);
        jobs = new Jobs(vault, workers);
        token = new TestToken();
        address[] memory modules = new address[](3);
        (modules[0], modules[1], modules[2]) = (address(workers), address(jobs), address(this));
        vault.seal(modules);
        vault.setToken(address(token), true);
        token.mint(address(this), PURSE);
        token.approve(address(vault), PURSE);
        vault.deposit(address(token), PURSE, CLIENT);
        quote = IJobs.Quote({
            specHash: "a spec",
            client: CLIENT,
            worker: address(this),
            token: address(token),
            amount: 0,
            penalty: 0,
            validBefore: uint40(block.timestamp + 1 hours),
            deadline: uint40(block.timestamp + 1 days),
            window: 1 hours,
            resolver: address(0),
            salt: 0
        });
    }

    /// @dev ERC-1271: the worker is this contract, and signs what it is asked to.
    function isValidSignature(bytes32, bytes calldata) external pure returns (bytes4) {
        return 0x1626ba7e;
    }

    function _opened(uint128 amount) private {
        vm.assume(amount > 0 && amount <= PURSE);
        quote.amount = amount;
        vm.prank(CLIENT);
        jobs.open(quote, "", "");
    }

    function _submitted(uint128 amount, uint128 claimed) private {
        _opened(amount);
        vm.assume(claimed <= amount);
        jobs.submit(quote, RESULT, claimed, "");
    }

    /// @dev I6: what was locked is all paid out, to the two sides alone, and the job is over.
    function _split(uint128 paid, IJobs.State state) private view {
        assert(vault.balanceOf(address(token), address(this)) == paid);
        assert(vault.balanceOf(address(token), CLIENT) == PURSE - paid);
        assert(vault.lockedBy(address(jobs), address(token)) == 0);
        assert(vault.liabilities(address(token)) == PURSE);
        assert(jobs.job(jobs.jobIdOf(quote)).state == state);
    }

    function check_settlePaysBetweenClaimAndAmount(uint128 amount, uint128 claimed, uint128 paid) public {
        _submitted(amount, claimed);
        vm.prank(CLIENT);
        (bool settled,) = address(jobs).call(abi.encodeCall(jobs.settle, (quote, RESULT, paid, "")));
        assert(settled == (claimed <= paid && paid <= amount));
        if (settled) _split(paid, IJobs.State.Settled);
    }

    function check_settleBeforeTheResultPaysAll(uint128 amount, uint128 paid) public {
        _opened(amount);
        vm.prank(CLIENT);
        (bool settled,) = address(jobs).call(abi.encodeCall(jobs.settle, (quote, RESULT, paid, "")));
        assert(settled == (paid == amount));
        if (settled) _split(paid, IJobs.State.Settled);
    }

    /// I5: silence pays what was claimed, and not a second before the window has ended.
    function check_finalizeWaitsAndPaysTheClaim(uint128 amount, uint128 claimed, uint32 waited) public {
        _submitted(amount, claimed);
        vm.warp(block.timestamp + waited);
        (bool done,) = address(jobs).call(abi.encodeCall(jobs.finalize, (quote)));
        assert(done == (waited >= quote.window));
        if (done) _split(claimed, IJobs.State.Settled);
    }

    /// I5: without a result everything goes back, and not a second before the deadline.
    function check_refundWaitsAndReturnsAll(uint128 amount, uint32 waited) public {
        _opened(amount);
        vm.warp(block.timestamp + waited);
        (bool done,) = address(jobs).call(abi.encodeCall(jobs.refund, (quote)));
        assert(done == (waited >= 1 days));
        if (done) _split(0, IJobs.State.Refunded);
    }

    /// With the whole amount claimed; what lies between is the attacker's, because the solver does not decide it in useful time.
    function check_resolvePaysAtMostTheClaim(uint128 amount, uint128 toWorker) public {
        _submitted(amount, amount);
        jobs.dispute(quote);
        (bool done,) = address(jobs).call(abi.encodeCall(jobs.resolve, (quote, toWorker, false)));
        assert(done == (toWorker <= amount));
        if (done) _split(toWorker, IJobs.State.Settled);
    }

    /// I3, I6: no second end, whichever came first.
    function check_overIsOver(uint128 amount, uint128 claimed, uint128 paid, uint8 which, uint32 waited) public {
        _submitted(amount, claimed);
        vm.prank(CLIENT);
        jobs.settle(quote, RESULT, amount, "");
        vm.warp(block.timestamp + waited);
        bytes memory again = which == 0
            ? abi.encodeCall(jobs.settle, (quote, RESULT, paid, ""))
            : which == 1
                ? abi.encodeCall(jobs.finalize, (quote))
                : which == 2
                    ? abi.encodeCall(jobs.refund, (quote))
                    : which == 3
                        ? abi.encodeCall(jobs.fail, (quote))
                        : which == 4
                            ? abi.encodeCall(jobs.resolve, (quote, paid, true))
                            : abi.encodeCall(jobs.open, (quote, "", ""));
        (bool done,) = address(jobs).call(again);
        assert(!done);
        _split(amount, IJobs.State.Settled);
    }
}
