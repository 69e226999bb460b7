// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IChannels} from "../src/interfaces/IChannels.sol";
import {IDisputes} from "../src/interfaces/IDisputes.sol";
import {IJobs} from "../src/interfaces/IJobs.sol";
import {IResolver} from "../src/interfaces/IResolver.sol";
import {Court} from "./Court.sol";

contract DisputesTest is Court {
    address private constant PAYOUT = address(0x9999);

    function testFuzz_everyOutcomePaysWhatTheTableSays(uint128 amount, uint128 claimed, uint8 answer) public {
        amount = uint128(within(amount, 1, PURSE / 2));
        claimed = uint128(within(claimed, 0, amount));
        IResolver.Outcome outcome = IResolver.Outcome(answer % 4);
        IJobs.Quote memory quote = submitted(amount, claimed, address(judge), 1);
        address client = vm.addr(CLIENT);
        uint256 before = balance(client) + amount;
        uint256 bond = (uint256(amount) + 9) / 10;
        vm.prank(client);
        disputes.open(quote, 0);
        same(locked(address(disputes)), bond, "bond");
        judge.say(outcome);
        if (outcome == IResolver.Outcome.None) vm.warp(block.timestamp + 14 days);
        disputes.resolve(quote);

        bool accepted = outcome == IResolver.Outcome.Accept;
        bool rejected = outcome == IResolver.Outcome.Reject;
        uint256 fee = outcome == IResolver.Outcome.None ? 0 : bond / 2;
        uint256 toWorker = accepted ? 0 : rejected ? claimed : claimed / 2;
        uint256 workers_ = toWorker + (rejected ? bond - fee : 0);
        same(balance(address(judge)), fee, "fee");
        same(balance(PAYOUT), workers_, "worker");
        same(balance(client), before - workers_ - fee, "client");
        same(locked(address(disputes)) + locked(address(jobs)), 0, "locks");
        same(workers.stakeOf(address(this), address(token)).held, 0, "held");
        same(workers.stakeOf(address(this), address(token)).active, accepted ? 999_500 : 1_000_000, "stake");
    }

    function testFuzz_silenceLastsUntilTheLastSecond(uint256 wait) public {
        wait = within(wait, 0, 14 days - 1);
        IJobs.Quote memory quote = disputed(1000, 900, address(judge), 1);
        uint40 resolveBy = uint40(block.timestamp + 14 days);
        vm.warp(block.timestamp + wait);
        bytes32 jobId = jobs.jobIdOf(quote);
        vm.expectRevert(abi.encodeWithSelector(IDisputes.Disputes_Undecided.selector, jobId, resolveBy));
        disputes.resolve(quote);
        vm.warp(resolveBy);
        disputes.resolve(quote);
        vm.expectRevert(abi.encodeWithSelector(IDisputes.Disputes_Ended.selector, jobId));
        disputes.resolve(quote);
    }

    function testFuzz_onlyTheClientOpens(address stranger) public {
        vm.assume(stranger != vm.addr(CLIENT));
        IJobs.Quote memory quote = submitted(1000, 900, address(judge), 1);
        bytes32 jobId = jobs.jobIdOf(quote);
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IDisputes.Disputes_NotClient.selector, jobId, stranger));
        disputes.open(quote, 0);
    }

    /// @dev Whatever gas comes along: the resolver has all that it may use, or nothing happens.
    function testFuzz_noStarvedCase(uint256 gas) public {
        gas = within(gas, 100_000, 1_500_000);
        judge.eat(360_000);
        IJobs.Quote memory quote = submitted(1000, 900, address(judge), 1);
        bytes memory call = abi.encodeCall(disputes.open, (quote, 0));
        vm.prank(vm.addr(CLIENT));
        (bool opened,) = address(disputes).call{gas: gas}(call);
        require(opened == judge.took(), "a case that its resolver did not hear");
        require(opened == (disputes.disputeOf(jobs.jobIdOf(quote)).bond > 0), "half a case");
    }

    function testFuzz_bondIsATenthRoundedUp(uint128 amount) public view {
        uint256 bond = disputes.bondFor(quoteOf(amount, address(judge), 0));
        require(bond >= 1 && bond * 10 >= amount && (bond == 1 || (bond - 1) * 10 < amount), "bond");
    }

    function testFuzz_equivocationIsByTheReceiversKeyAlone(uint256 one, uint256 other) public {
        (one, other) = (within(one, 1, 2 ** 128), within(other, 1, 2 ** 128));
        if (one % 3 == 0) one = WORKER;
        if (other % 3 == 0) other = WORKER;
        (IChannels.ChannelConfig memory config, IDisputes.Receipt memory first, IDisputes.Receipt memory second) = fraud();
        bytes memory a = signed(one, disputes.receiptDigest(first));
        bytes memory b = signed(other, disputes.receiptDigest(second));
        bool guilty = one == WORKER && other == WORKER;
        if (!guilty) vm.expectRevert(abi.encodeWithSelector(IDisputes.Disputes_BadSignature.selector, vm.addr(WORKER)));
        disputes.proveEquivocation(config, first, a, second, b);
        require(workers.isConvicted(vm.addr(WORKER)) == guilty, "conviction");
    }

    function testFuzz_receiptsThatAgreeConvictNobody(uint64 sequence, bool same_) public {
        (IChannels.ChannelConfig memory config, IDisputes.Receipt memory first, IDisputes.Receipt memory second) = fraud();
        vm.assume(sequence != first.sequence);
        if (same_) second = first;
        else second.sequence = sequence;
        bytes memory a = signed(WORKER, disputes.receiptDigest(first));
        bytes memory b = signed(WORKER, disputes.receiptDigest(second));
        vm.expectRevert(abi.encodeWithSelector(IDisputes.Disputes_NoEquivocation.selector));
        disputes.proveEquivocation(config, first, a, second, b);
    }

    function fraud()
        private
        view
        returns (IChannels.ChannelConfig memory config, IDisputes.Receipt memory first, IDisputes.Receipt memory second)
    {
        config = IChannels.ChannelConfig(
            vm.addr(CLIENT), vm.addr(CLIENT), vm.addr(WORKER), vm.addr(MALLORY), address(token), 15 minutes, 0
        );
        first.channelId = second.channelId = channels.channelIdOf(config);
        first.sequence = second.sequence = 7;
        second.outputDigest = keccak256("another answer");
    }
}
