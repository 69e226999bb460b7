// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IChannels} from "../src/interfaces/IChannels.sol";
import {Fixture} from "./Fixture.sol";

contract ChannelsTest is Fixture {
    function testFuzz_allocateRaisesToTheTotal(uint128 first, uint128 second) public {
        first = uint128(within(first, 1, PURSE));
        second = uint128(within(second, 0, PURSE));
        allocate(first);
        if (second <= first) {
            bytes memory proof = signed(PAYER, channels.allocationDigest(id, second, FOREVER));
            vm.expectRevert(abi.encodeWithSelector(IChannels.Channels_NotHigher.selector, id, first, second));
            channels.allocate(config, second, FOREVER, proof);
            second = first;
        } else {
            allocate(second);
        }
        same(channels.channel(id).allocated, second, "allocated");
        same(balance(config.payer), PURSE - second, "taken once");
        same(vault.lockedBy(address(channels), address(token)), second, "locked");
    }

    function testFuzz_allocateNeedsThePayer(uint256 key, uint128 amount) public {
        key = within(key, 1, 2 ** 128);
        vm.assume(key != PAYER);
        amount = uint128(within(amount, 1, PURSE));
        bytes memory proof = signed(key, channels.allocationDigest(id, amount, FOREVER));
        vm.expectRevert(abi.encodeWithSelector(IChannels.Channels_BadSignature.selector, id, config.payer));
        channels.allocate(config, amount, FOREVER, proof);
    }

    function testFuzz_claimTakesAmountUnderTheCeiling(uint128 allocated, uint128 amount, uint128 ceiling, uint256 key)
        public
    {
        allocated = uint128(within(allocated, 1, PURSE));
        amount = uint128(within(amount, 0, PURSE + 1));
        ceiling = uint128(within(ceiling, 0, PURSE + 1));
        key = key % 3 == 0 ? MALLORY : SESSION;
        allocate(allocated);
        bool good = key == SESSION && amount > 0 && amount <= ceiling && amount <= allocated;
        same(claim(amount, ceiling, key), good ? amount : 0, "claimed (I2, I4)");
        same(claim(amount, ceiling, key), 0, "paid twice (I3)");
        same(channels.owed(config.receiver, address(token)), good ? amount : 0, "owed");
    }

    function testFuzz_finalizeOnlyAfterTheDelay(uint40 delay, uint256 waited) public {
        config.withdrawDelay = uint40(within(delay, 15 minutes, 30 days));
        id = channels.channelIdOf(config);
        waited = within(waited, 0, 60 days);
        allocate(100);
        uint40 ready = uint40(block.timestamp) + config.withdrawDelay;
        vm.prank(config.payerAuthorizer);
        channels.initiateWithdraw(config);
        uint256 now_ = block.timestamp + waited;
        vm.warp(now_);
        if (now_ < ready) {
            vm.expectRevert(abi.encodeWithSelector(IChannels.Channels_TooEarly.selector, id, ready, now_));
        }
        channels.finalizeWithdraw(config);
        same(balance(config.payer), now_ < ready ? PURSE - 100 : PURSE, "I5");
    }

    function testFuzz_closeSplitsEverything(uint128 allocated, uint128 claimed, uint128 last) public {
        allocated = uint128(within(allocated, 1, PURSE));
        claimed = uint128(within(claimed, 0, allocated));
        last = uint128(within(last, claimed, allocated));
        allocate(allocated);
        claim(claimed, claimed, SESSION);
        channels.close(
            config,
            last,
            last,
            signed(SESSION, channels.voucherDigest(id, last)),
            signed(WORKER, channels.closeDigest(id, last))
        );
        if (claimed > 0) channels.settle(config.receiver, address(token));
        same(balance(config.receiver), last, "claim");
        same(balance(config.payer), PURSE - last, "refund (I6)");
        same(vault.lockedBy(address(channels), address(token)), 0, "I12");
        vm.expectRevert(abi.encodeWithSelector(IChannels.Channels_Closed.selector, id));
        channels.close(config, last, last, "", "");
    }

    function testFuzz_strangersCanNotBeginAWithdrawal(address stranger) public {
        vm.assume(stranger != config.payer && stranger != config.payerAuthorizer);
        allocate(1);
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(IChannels.Channels_NotPayer.selector, id, stranger));
        channels.initiateWithdraw(config);
    }
}
