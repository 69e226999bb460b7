// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobs} from "../src/interfaces/IJobs.sol";
import {Court} from "./Court.sol";

contract JobsTest is Court {
    address private constant PAYOUT = address(0x9999);

    function testFuzz_openNeedsBothWords(uint256 workerKey, uint256 clientKey, uint128 amount) public {
        amount = uint128(within(amount, 1, PURSE));
        workerKey = workerKey % 3 == 0 ? MALLORY : WORKER;
        clientKey = clientKey % 3 == 0 ? MALLORY : CLIENT;
        IJobs.Quote memory quote = quoteOf(amount, address(0), 1);
        bytes32 id = jobs.jobIdOf(quote);
        bytes memory word = signed(workerKey, id);
        bytes memory order = signed(clientKey, jobs.orderDigest(id));
        bool good = workerKey == WORKER && clientKey == CLIENT;
        if (!good) {
            address signer = workerKey == WORKER ? quote.client : quote.worker;
            vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_BadSignature.selector, id, signer));
        }
        jobs.open(quote, word, order);
        same(locked(address(jobs)), good ? amount : 0, "I4");
        same(workers.stakeOf(address(this), address(token)).held, good ? quote.penalty : 0, "held");
        if (!good) return;
        vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_WrongState.selector, id, IJobs.State.Open));
        jobs.open(quote, word, order);
    }

    function testFuzz_aPenaltyIsTheWorkersToPutAtRisk(uint128 penalty, uint8 who) public {
        IJobs.Quote memory quote = quoteOf(1, address(0), 1);
        quote.penalty = uint128(within(penalty, 0, 100));
        bytes32 id = jobs.jobIdOf(quote);
        bytes memory word = signed(WORKER, id);
        bytes memory order = signed(CLIENT, jobs.orderDigest(id));
        address sender = [quote.worker, address(this), quote.client, address(0xbad)][who % 4];
        bool good = quote.penalty == 0 || who % 4 < 2;
        if (!good) vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_NotWorker.selector, id, sender));
        vm.prank(sender);
        jobs.open(quote, word, order);
        same(locked(address(jobs)), good ? 1 : 0, "I4");
    }

    function testFuzz_theWindowBelongsToTheClient(uint128 amount, uint128 claimed, uint40 window, uint256 waited) public {
        (amount, claimed) = _amounts(amount, claimed);
        IJobs.Quote memory quote = quoteOf(amount, address(0), 1);
        quote.window = uint40(within(window, 15 minutes, 7 days));
        bytes32 id = _open(quote);
        vm.prank(quote.worker);
        jobs.submit(quote, RESULT, claimed, "");
        uint256 end = block.timestamp + quote.window;
        uint256 now_ = block.timestamp + within(waited, 0, 8 days);
        vm.warp(now_);
        if (now_ < end) vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_TooEarly.selector, id, end, now_));
        jobs.finalize(quote);
        _split(quote, now_ < end ? 0 : claimed, now_ < end ? amount : 0);
    }

    function testFuzz_theDeadlineBelongsToTheWorker(uint128 amount, uint40 allowed, uint256 waited) public {
        (amount,) = _amounts(amount, 0);
        IJobs.Quote memory quote = quoteOf(amount, address(0), 1);
        quote.deadline = uint40(block.timestamp + within(allowed, 1, 30 days));
        bytes32 id = _open(quote);
        uint256 now_ = block.timestamp + within(waited, 0, 31 days);
        vm.warp(now_);
        bool late = now_ >= quote.deadline;
        if (!late) {
            vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_TooEarly.selector, id, quote.deadline, now_));
        }
        jobs.refund(quote);
        _split(quote, 0, late ? 0 : amount);
        vm.prank(quote.worker);
        if (late) vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_WrongState.selector, id, IJobs.State.Refunded));
        jobs.submit(quote, RESULT, amount, "");
    }

    function testFuzz_theClientPaysWhatWasClaimedOrMore(uint128 amount, uint128 claimed, uint128 paid, bool sent) public {
        (amount, claimed) = _amounts(amount, claimed);
        paid = uint128(within(paid, 0, amount));
        IJobs.Quote memory quote = quoteOf(amount, address(0), 1);
        bytes32 id = _open(quote);
        if (sent) {
            vm.prank(quote.worker);
            jobs.submit(quote, RESULT, claimed, "");
        }
        uint128 least = sent ? claimed : amount;
        bytes memory accepted = signed(CLIENT, jobs.acceptanceDigest(id, RESULT, paid));
        if (paid < least) {
            vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_BelowClaimed.selector, id, least, paid));
        }
        jobs.settle(quote, RESULT, paid, accepted);
        _split(quote, paid < least ? 0 : paid, paid < least ? amount : 0);
        if (paid < least) return;
        vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_WrongState.selector, id, IJobs.State.Settled));
        jobs.settle(quote, RESULT, paid, accepted);
    }

    function testFuzz_failingCostsAQuarterInTimeAndAllAfterTheSubmission(uint128 penalty, bool sent, bool byOwner) public {
        penalty = uint128(within(penalty, 0, 400_000));
        IJobs.Quote memory quote = quoteOf(1000, address(0), 1);
        quote.penalty = penalty;
        _open(quote);
        if (sent) {
            vm.prank(quote.worker);
            jobs.submit(quote, RESULT, 1000, "");
        }
        if (!byOwner) vm.prank(quote.worker);
        jobs.fail(quote);
        _split(quote, 0, 0);
        same(
            workers.stakeOf(address(this), address(token)).active,
            1_000_000 - (sent ? penalty : penalty / 4),
            "price"
        );
        if (penalty < 4) return;
        vm.warp(block.timestamp + 7 days);
        workers.moveSlash(1);
        same(balance(quote.client), PURSE + (sent ? penalty : penalty / 4) / 2, "half for the client");
    }

    function testFuzz_strangersEndNothingEarly(address stranger) public {
        IJobs.Quote memory quote = quoteOf(1000, address(0), 1);
        vm.assume(stranger != quote.worker && stranger != quote.client && stranger != address(this));
        vm.assume(!vault.isModule(stranger));
        bytes32 id = _open(quote);
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_NotWorker.selector, id, stranger));
        jobs.fail(quote);
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_BadSignature.selector, id, quote.worker));
        jobs.submit(quote, RESULT, 1, "");
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_BadSignature.selector, id, quote.client));
        jobs.settle(quote, RESULT, 1000, "");
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_NotModule.selector, stranger));
        jobs.dispute(quote);
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_NotModule.selector, stranger));
        jobs.resolve(quote, 0, false);
    }

    function testFuzz_aVerdictSplitsTheWholeAmount(uint128 amount, uint128 claimed, uint128 toWorker, bool penalize) public {
        (amount, claimed) = _amounts(amount, claimed);
        toWorker = uint128(within(toWorker, 0, claimed));
        IJobs.Quote memory quote = submitted(amount, claimed, address(0), 1);
        vm.prank(address(disputes));
        jobs.dispute(quote);
        vm.warp(block.timestamp + 100 days); // no silence ends a dispute here: that is IDisputes
        bytes32 id = jobs.jobIdOf(quote);
        vm.expectRevert(abi.encodeWithSelector(IJobs.Jobs_WrongState.selector, id, IJobs.State.Disputed));
        jobs.finalize(quote);
        vm.prank(address(disputes));
        jobs.resolve(quote, toWorker, penalize);
        _split(quote, toWorker, 0);
        same(
            workers.stakeOf(address(this), address(token)).active, 1_000_000 - (penalize ? quote.penalty : 0), "penalty"
        );
    }

    function _amounts(uint128 amount, uint128 claimed) private pure returns (uint128, uint128) {
        amount = uint128(within(amount, 1, PURSE));
        return (amount, uint128(within(claimed, 0, amount)));
    }

    function _open(IJobs.Quote memory quote) private returns (bytes32 id) {
        id = jobs.jobIdOf(quote);
        jobs.open(quote, signed(WORKER, id), signed(CLIENT, jobs.orderDigest(id)));
    }

    /// @dev I6: what was paid, returned and is still locked is the whole purse; nothing is held for an ended job (I12).
    function _split(IJobs.Quote memory quote, uint256 paid, uint256 still) private view {
        same(balance(PAYOUT), paid, "paid");
        same(locked(address(jobs)), still, "locked");
        same(balance(quote.client), PURSE - paid - still, "returned");
        same(workers.stakeOf(address(this), address(token)).held, still > 0 ? quote.penalty : 0, "held");
    }
}
